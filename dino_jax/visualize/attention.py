"""Where the class token of the last block looks: maps, masks of their mass, and how these score.

Dims: B images, H and W pixels, C channels, h heads, r rows and c columns of patches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dino_jax import sharding
from dino_jax.data.transforms.color import normalize
from dino_jax.errors import UsageError
from dino_jax.models.network import split
from dino_jax.visualize.pictures import check_finite, check_memory
from dino_jax.weights.info import WeightsInfo

THRESHOLD = 0.6  # share of a map's mass, as in the paper's pictures and scores

PyTree = Any
AttentionFn = Callable[[PyTree, PyTree, jax.Array | np.ndarray], jax.Array]


def attention_function(
    graphdef: nnx.GraphDef, mean: Sequence[float], std: Sequence[float], mesh: Mesh
) -> AttentionFn:
    """Compiles the attention of the class token to the patches; once for every size of images.

    Args:
      graphdef: of a ViT or an XCiT in evaluation mode.
      mean: C values on the scale 0..1.
      std: C values on the scale 0..1.
      mesh: the devices that hold the weights; each of them gets all images.
    Returns: maps (params, batch_stats, images [B, H, W, C] uint8, of whole patches) to [B, h, r, c]
      float32, after the softmax: a map's sum is what the class token does not give to itself.
    """

    def attention(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        model = nnx.merge(graphdef, params, batch_stats)
        pixels = normalize(jnp.moveaxis(images, -1, -3), mean, std)
        with jax.default_matmul_precision("highest"):  # as `features.feature_function`
            weights = model.get_last_selfattention(pixels)
        rows, columns = (side // model.patch_size for side in images.shape[1:3])
        return weights[:, :, 0, 1:].reshape(*weights.shape[:2], rows, columns)

    return jax.jit(attention, out_shardings=sharding.replicated(mesh))


def attention_of(model: nnx.Module, info: WeightsInfo) -> Callable[[np.ndarray], np.ndarray]:
    """The attention of loaded weights: one image [H, W, C] uint8 to [h, r, c], on one device.

    Raises:
      UsageError: the network has no attention; or, when called, the image is too large for it, or
        the maps are not finite.
    """
    check_attends(model, info.source)
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    graphdef, *weights = split(model)
    function = attention_function(graphdef, info.mean, info.std, mesh)
    weights = jax.device_put(weights, sharding.replicated(mesh))

    def attend(image: np.ndarray) -> np.ndarray:
        check_memory(image, model)
        maps = jax.device_get(function(*weights, image[None]))[0]
        check_finite(maps, f"the attention maps of {info.source}")
        return maps

    return attend


def check_attends(model: nnx.Module, name: str) -> None:
    """Raises UsageError for a network without attention; `name` is what the user called it."""
    if not hasattr(model, "get_last_selfattention"):
        raise UsageError(
            f"{name} is a {type(model).__name__}, which has no attention: it takes a ViT or an XCiT"
        )


def mass_mask(attention: np.ndarray, threshold: float) -> np.ndarray:
    """The patches of the largest values that hold a share of a map's mass.

    Args:
      attention: [..., r, c], not negative.
      threshold: the share.
    Returns: [..., r, c] bool; the value that crosses the share is in.
    """
    values = attention.reshape(*attention.shape[:-2], -1).astype(np.float64)
    order = values.argsort(axis=-1)
    mass = np.take_along_axis(values, order, axis=-1).cumsum(axis=-1)
    mask = np.empty(values.shape, bool)
    np.put_along_axis(mask, order, mass > (1 - threshold) * mass[..., -1:], axis=-1)
    return mask.reshape(attention.shape)


def to_pixels(patches: np.ndarray, patch_size: int, shape: tuple[int, int]) -> np.ndarray:
    """Every pixel gets its patch's value: [..., r, c] -> [..., H, W], where shape = (H, W)."""
    rows, columns = (np.arange(side) // patch_size for side in shape)
    return patches[..., rows[:, None], columns]


def jaccard(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union, also known as IoU.

    Args:
      masks: [..., H, W] bool.
      truth: [H, W] bool; where it and a mask are both empty, the score is 1.
    Returns: [...] in 0..1.
    """
    both = (masks & truth).sum(axis=(-2, -1))
    either = (masks | truth).sum(axis=(-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def check_threshold(threshold: float | None) -> None:
    """Raises UsageError unless it is a share of a map's mass, or None."""
    if threshold is not None and not 0 < threshold < 1:
        raise UsageError(
            f"threshold={threshold} must lie between 0 and 1: it is the share of a map's mass that "
            "its mask holds, 0.6 in the paper"
        )
