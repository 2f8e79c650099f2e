"""Principal components of patch tokens as colours, and the foreground patches.

Dims: N tokens of all pictures, D width.
"""

import numpy as np


def principal_components(tokens: np.ndarray, count: int) -> np.ndarray:
    """Projects tokens onto their principal components.

    Args:
      tokens: [N, D].
      count: number of components, at most D.
    Returns: [N, count] float64, centred, most important first. The sign of each direction is chosen
      so that its largest entry is positive.
    """
    centred = tokens - tokens.mean(axis=0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :count]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    return centred @ (directions * np.sign(largest))


def to_colors(components: np.ndarray) -> np.ndarray:
    """Maps three components to red, green and blue.

    Args:
      components: [N, 3].
    Returns: [N, 3] uint8; each component is scaled to its 1st and 99th percentiles.
    """
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return np.round(255 * scaled.clip(0, 1)).astype(np.uint8)


def is_foreground(first: np.ndarray, on_border: np.ndarray) -> np.ndarray:
    """Separates foreground and background by the first component.

    Args:
      first: [N].
      on_border: [N] bool, tokens at the border of their picture. The border is mostly background,
        so the side with fewer border tokens is the foreground.
    Returns: [N] bool.
    """
    upper = first >= _otsu(first)
    return ~upper if upper[on_border].mean() > upper.mean() else upper


def _otsu(values: np.ndarray) -> float:
    """The lower limit of the upper of two classes, by the method of Otsu (1979)."""
    ordered = np.sort(values)
    below = np.arange(1, len(values))
    sums = ordered.cumsum()
    between = (sums[-1] * below / len(values) - sums[:-1]) ** 2 / (below * below[::-1])
    return ordered[1 + between.argmax()] if len(values) > 1 else ordered[0]
