"""Principal components of patch tokens as colours, and which patches are foreground.

Dims: N tokens of all pictures, D width.
"""

import numpy as np


def principal_components(tokens: np.ndarray, count: int) -> np.ndarray:
    """Projects tokens onto the directions in which they vary most.

    Args:
      tokens: [N, D].
      count: of components, at most D.
    Returns: [N, count] float64, centred, most important first. The sign of a direction, which is
      free, makes its largest entry positive.
    """
    centred = tokens - tokens.mean(axis=0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :count]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    return centred @ (directions * np.sign(largest))


def to_colors(components: np.ndarray) -> np.ndarray:
    """Three components as red, green and blue.

    Args:
      components: [N, 3].
    Returns: [N, 3] uint8; each is stretched between its 1st and its 99th percentile.
    """
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return np.round(255 * scaled.clip(0, 1)).astype(np.uint8)


def is_foreground(first: np.ndarray, on_border: np.ndarray) -> np.ndarray:
    """Splits tokens in two by their first component.

    Args:
      first: [N].
      on_border: [N] bool: which lie at the edge of their picture, where background is likelier;
        the side that has less of them is the foreground.
    Returns: [N] bool.
    """
    upper = first >= _otsu(first)
    return ~upper if upper[on_border].mean() > upper.mean() else upper


def _otsu(values: np.ndarray) -> float:
    """The least value of the upper of two classes that differ most (Otsu, 1979)."""
    ordered = np.sort(values)
    below = np.arange(1, len(values))
    sums = ordered.cumsum()
    between = (sums[-1] * below / len(values) - sums[:-1]) ** 2 / (below * below[::-1])
    return ordered[1 + between.argmax()] if len(values) > 1 else ordered[0]
