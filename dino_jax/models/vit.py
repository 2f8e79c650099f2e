"""DINO's Vision Transformer (Caron et al., 2021, arXiv 2104.14294).

Dims: B images, H and W pixels, C channels, N tokens (class token first), D width, h heads.
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.attention import check_kernel
from dino_jax.models.block import Block, check_transformer
from dino_jax.models.layers import (
    at_least_float32,
    check_counts,
    check_images,
    image_draws,
    layer_norm,
    normal_init,
    torch_uniform_init,
)
from dino_jax.models.remat import check_remat, run_block


def resize_pos_embed(pos_embed: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resizes the patch positions of a position table, exactly as the reference does.

    It uses torch's bicubic kernel (a = -0.75, no antialiasing). The scale is (n + 0.1) / S instead
    of n / S for n patches, as in the reference, which shifts the sampling grid slightly.

    Args:
      pos_embed: [1, 1 + S*S, D], class token first.
      grid: rows and columns of patches of the result.
    Returns: [1, 1 + rows*columns, D].
    """
    class_row, patch_rows = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(patch_rows.shape[1] ** 0.5)
    dim = pos_embed.shape[-1]
    scale = jnp.asarray([(n + 0.1) / side for n in grid], pos_embed.dtype)
    resized = jax.image.scale_and_translate(
        patch_rows.reshape(side, side, dim),
        (*grid, dim),
        spatial_dims=(0, 1),
        scale=scale,
        translation=jnp.zeros_like(scale),
        method="cubic-pytorch",
        antialias=False,
    )
    return jnp.concatenate([class_row, resized.reshape(1, -1, dim)], axis=1)


class VisionTransformer(nnx.Module):
    """Images to features: the class token after the last norm.

    Args:
      patch_size: side of a patch in pixels.
      embed_dim: width D.
      depth: number of blocks.
      num_heads: heads of each block; must divide `embed_dim`.
      image_size: side in pixels of the images for which the position table is made; for images of
        other sizes it is resized.
      in_channels: channels of the images.
      mlp_ratio: hidden width of the MLP / D.
      drop_path_rate: stochastic depth of the last block; it increases linearly from 0 in the first.
      attention: attention kernel: "xla", or "cudnn" for 16-bit dtypes on a GPU.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.

    Raises:
      UsageError: invalid or inconsistent sizes, or an unknown `attention` or `remat`.
    """

    family: ClassVar[str] = "vit"

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        image_size: int = 224,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        attention: str = "xla",
        remat: str = "none",
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_transformer(embed_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        check_kernel(attention, dtype)
        check_remat(remat)
        check_counts(patch_size=patch_size, image_size=image_size, in_channels=in_channels)
        if image_size % patch_size:
            raise UsageError(
                f"image_size={image_size} is not a multiple of patch_size={patch_size}: "
                "change one of them, because the position table needs whole patches"
            )
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.in_channels = in_channels
        self.remat = remat
        fan_in = patch_size**2 * in_channels
        uniform = torch_uniform_init(fan_in)
        # A convolution with stride equal to kernel size is a linear layer on the pixels of a patch.
        self.patch_embed = nnx.Linear(
            fan_in, embed_dim, kernel_init=uniform, bias_init=uniform, dtype=dtype, rngs=rngs
        )
        tokens = 1 + (image_size // patch_size) ** 2
        self.cls_token = nnx.Param(normal_init(rngs.params(), (1, 1, embed_dim), jnp.float32))
        self.pos_embed = nnx.Param(normal_init(rngs.params(), (1, tokens, embed_dim), jnp.float32))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nnx.List(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                drop_path_rate=rate,
                attention=attention,
                dtype=dtype,
                rngs=rngs,
            )
            for rate in rates
        )
        self.norm = layer_norm(embed_dim, dtype=dtype, rngs=rngs)

    def _tokens(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 1 + rows*columns, D], with positions; incomplete patches are cut."""
        check_images(images, self.in_channels, self.patch_size, "one patch")
        batch, height, width, channels = images.shape
        side = self.patch_size
        rows, columns = height // side, width // side
        patches = images[:, : rows * side, : columns * side]
        patches = patches.reshape(batch, rows, side, columns, side, channels).swapaxes(2, 3)
        x = self.patch_embed(patches.reshape(batch, rows * columns, side * side * channels))
        pos_embed = self.pos_embed[...]
        if rows * columns != pos_embed.shape[1] - 1 or height != width:
            pos_embed = resize_pos_embed(pos_embed, (rows, columns))
        class_tokens = jnp.broadcast_to(self.cls_token[...], (batch, 1, self.embed_dim))
        x = jnp.concatenate([class_tokens.astype(x.dtype), x], axis=1)
        return x + pos_embed.astype(x.dtype)

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Features of images.

        Args:
          images: [B, H, W, C] float, normalised; any H and W of at least one patch.
          keys: [B] typed PRNG keys for stochastic depth; None disables it.
        Returns: [B, D], float32 (float64 for float64 weights).
        """
        x = self._tokens(images)
        *draws, last_draw = image_draws(keys, len(self.blocks), branches=2)
        for block, draw in zip(self.blocks[:-1], draws, strict=True):
            x = run_block(block, self.remat, x, draw)
        x = run_block(self.blocks[-1], self.remat, x, last_draw, class_only=True)
        return at_least_float32(self.norm(x[:, 0]))

    def get_intermediate_layers(self, images: jax.Array, n: int = 1) -> list[jax.Array]:
        """Tokens after each of the last n blocks, all normalised by the final norm.

        Args:
          images: [B, H, W, C] float, normalised.
          n: number of blocks, at most the depth.
        Returns: n arrays [B, N, D], class token first, in the order of the blocks.
        Raises:
          UsageError: n is out of range.
        """
        if not 1 <= n <= len(self.blocks):
            raise UsageError(f"n={n} must be between 1 and the depth, {len(self.blocks)}")
        x, outputs = self._tokens(images), []
        for i, block in enumerate(self.blocks):
            x = block(x, None)
            if i >= len(self.blocks) - n:
                outputs.append(at_least_float32(self.norm(x)))
        return outputs

    def get_last_selfattention(self, images: jax.Array) -> jax.Array:
        """Attention weights of the last block: [B, H, W, C] -> [B, h, N, N]."""
        x = self._tokens(images)
        for block in self.blocks[:-1]:
            x = block(x, None)
        last = self.blocks[-1]
        q, k, _ = last.attn.queries_keys_values(last.norm1(x))
        return last.attn.weights(q, k)


vit_tiny = partial(VisionTransformer, patch_size=16, embed_dim=192, depth=12, num_heads=3)
vit_small = partial(VisionTransformer, patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base = partial(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large = partial(VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
vit_huge = partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16)

ARCHITECTURES = {
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_huge": vit_huge,
    "deit_tiny": vit_tiny,  # aliases, as in the reference
    "deit_small": vit_small,
    "deit_base": vit_base,
}
