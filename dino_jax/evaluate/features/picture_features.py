"""What the drawing jobs take from a backbone: attention maps and patch tokens of whole pictures.

Dims: B images, H and W pixels, C channels, h heads, r rows and c columns of patches, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dino_jax.data.transforms.color import normalize
from dino_jax.distributed import least_of_hosts
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.tokens import intermediate_layers
from dino_jax.memory import device_limit, gib, machine_memory

_HEADROOM = 4  # copies of the attention weights that a batch may take: logits, softmax, slack


@dataclasses.dataclass(frozen=True)
class _Normalized:
    """Normalises pictures before they enter the backbone.

    Attributes:
      mean: C values on the scale 0..1.
      std: C values on the scale 0..1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, canvas: jax.Array) -> jax.Array:
        """[B, H, W, C] uint8 -> the backbone's input."""
        return normalize(jnp.moveaxis(canvas, -1, -3), self.mean, self.std)


class AttentionMaps(_Normalized):
    """Attention from the class token of the last block to the patches."""

    def __call__(self, model: nnx.Module, canvas: jax.Array, _: jax.Array | None) -> jax.Array:
        """[B, H, W, C] uint8 of whole patches -> [B, h, r, c] float32, after the softmax.

        The sum of a map is the attention that the class token does not pay to itself.
        """
        weights = model.get_last_selfattention(self.pixels(canvas))
        rows, columns = (side // model.patch_size for side in canvas.shape[1:3])
        return weights[:, :, 0, 1:].reshape(*weights.shape[:2], rows, columns)


class PatchTokens(_Normalized):
    """Patch tokens of the last block of a ViT."""

    def __call__(self, model: nnx.Module, canvas: jax.Array, _: jax.Array | None) -> jax.Array:
        """[B, H, W, C] uint8 of whole patches -> [B, r, c, D]."""
        tokens = intermediate_layers(model, self.pixels(canvas), 1)[0][:, 1:]
        grid = (side // model.patch_size for side in canvas.shape[1:3])
        return tokens.reshape(len(canvas), *grid, -1)


def check_attention(model: nnx.Module, name: str) -> None:
    """Raises UsageError for a network without attention; `name` is what the user called it."""
    if not hasattr(model, "get_last_selfattention"):
        raise UsageError(
            f"{name} is a {type(model).__name__}, which has no attention: use a ViT or an XCiT"
        )


def batch_that_fits(shape: tuple[int, int], model: nnx.Module, mesh: Mesh, batch_size: int) -> int:
    """The batch size for large pictures: `batch_size`, or less if memory is short.

    The attention weights of a ViT grow with the square of the number of patches, those of an XCiT
    do not.

    Args:
      shape: height and width of the pictures.
      model: the backbone.
      mesh: the devices that share a batch.
      batch_size: upper limit, over all devices.
    Raises:
      UsageError: the attention weights of a single picture exceed the memory of a device.
    """
    if getattr(model, "family", None) != "vit":
        return batch_size
    height, width = shape
    tokens = 1 + height // model.patch_size * (width // model.patch_size)
    need = 4 * model.num_heads * tokens**2
    limit = least_of_hosts(device_limit(mesh) or machine_memory())
    if need > limit:
        raise UsageError(
            f"{width}x{height} pixels are {tokens} tokens, whose attention weights take "
            f"{gib(need)} of memory; {gib(limit)} are available: give a smaller --size, such as "
            "--size 480 for the shorter side"
        )
    return min(batch_size, mesh.size * max(1, limit // (_HEADROOM * need)))
