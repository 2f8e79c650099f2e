"""The views of a batch, as a function of the seed, the epoch and each image's index."""

import jax

from dino_jax.data.transforms.multicrop import CropSettings, augment
from dino_jax.training.step import Batch


def make_views(
    batch: Batch, epoch: jax.Array, *, seed: int, crops: CropSettings
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """All views of a batch, and the PRNG keys for stochastic depth.

    All randomness for an image is derived from the seed, the epoch and its index in the data. It
    does not depend on its place in the batch, nor on devices, threads or accumulation.

    Args:
      batch: `canvas [B, S, S, C]` uint8, `size [B, 2]` int32 and `index [B]` int32.
      epoch: int32 [].
      seed: the seed of the run.
      crops: the multi-crop settings.
    Returns: the global views [B, 2, H, W, C] and, if L > 0, the local views [B, L, h, w, C]; and
      typed PRNG keys [B].
    """
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(batch["index"])
    views = augment(batch["canvas"], batch["size"], keys[:, 0], crops)
    return tuple(group for group in views if group.shape[1]), keys[:, 1]
