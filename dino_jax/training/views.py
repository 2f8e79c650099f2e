"""Crops of a batch, a function of the seed, the epoch and each image's index."""

import jax

from dino_jax.data.transforms.multicrop import CropSettings, augment
from dino_jax.training.step import Batch


def make_views(
    batch: Batch, epoch: jax.Array, *, seed: int, crops: CropSettings
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """All crops of a batch, and a key an image for stochastic depth.

    What is random about an image follows from the seed, the epoch and its index in the data; so it
    depends neither on the batch's layout nor on devices, threads or accumulation.

    Args:
      batch: `canvas [B, S, S, C]`, `size [B, 2]` and `index [B]`.
      epoch: int32 [].
      seed: of the run.
      crops: sizes, scales and probabilities.
    Returns: ([B, 2, H, W, C], [B, L, h, w, C]) without the latter where L is 0, and [B] keys.
    """
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(batch["index"])
    views = augment(batch["canvas"], batch["size"], keys[:, 0], crops)
    return tuple(group for group in views if group.shape[1]), keys[:, 1]
