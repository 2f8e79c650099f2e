"""Masks from attention maps: the patches that receive most of the attention.

Dims: H and W pixels, r rows and c columns of patches.
"""

import numpy as np

from dino_jax.errors import UsageError

THRESHOLD = 0.6  # share of a map's mass, as in the paper's figures and scores


def mass_mask(attention: np.ndarray, threshold: float) -> np.ndarray:
    """Selects the patches with the largest values that together hold a share of a map's mass.

    Args:
      attention: [..., r, c], not negative.
      threshold: the share.
    Returns: [..., r, c] bool; the value that crosses the threshold is included.
    """
    values = attention.reshape(*attention.shape[:-2], -1).astype(np.float64)
    order = values.argsort(axis=-1)
    mass = np.take_along_axis(values, order, axis=-1).cumsum(axis=-1)
    mask = np.empty(values.shape, bool)
    np.put_along_axis(mask, order, mass > (1 - threshold) * mass[..., -1:], axis=-1)
    return mask.reshape(attention.shape)


def to_pixels(patches: np.ndarray, patch_size: int, shape: tuple[int, int]) -> np.ndarray:
    """Repeats the value of each patch for its pixels: [..., r, c] -> [..., H, W].

    Args:
      patches: [..., r, c].
      patch_size: pixels.
      shape: (H, W).
    """
    rows, columns = (np.arange(side) // patch_size for side in shape)
    return patches[..., rows[:, None], columns]


def check_threshold(threshold: float | None) -> None:
    """Raises UsageError unless the threshold is None or a share between 0 and 1."""
    if threshold is not None and not 0 < threshold < 1:
        raise UsageError(
            f"threshold={threshold} must be between 0 and 1: it is the share of a map's mass that "
            "its mask holds, 0.6 in the paper"
        )
