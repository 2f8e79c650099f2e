"""XCiT, the cross-covariance image transformer (El-Nouby et al., 2021, arXiv 2106.09681).

Attention mixes channels instead of tokens, so its cost is linear in the number of tokens. 3x3
convolutions mix neighbouring tokens, and two final blocks of class attention collect the features.

Dims: B images, H and W pixels, C channels, N tokens (class token first), D width, h heads.
"""

import math
from functools import partial
from itertools import pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.block import check_transformer
from dino_jax.models.conv import ConvNorm, conv
from dino_jax.models.layers import (
    at_least_float32,
    check_counts,
    check_images,
    image_draws,
    layer_norm,
    normal_init,
)
from dino_jax.models.remat import check_remat, run_block
from dino_jax.models.xcit_block import ClassAttentionBlock, XCABlock

CLASS_BLOCKS = 2
POSITION_DIM = 32  # per direction
POSITION_TEMPERATURE = 10000.0


def fourier_positions(grid: tuple[int, int]) -> jax.Array:
    """Sines and cosines of the positions in a grid, whose last row and column are at 2 pi.

    Args:
      grid: rows and columns.
    Returns: [rows, columns, 2 * POSITION_DIM] float32: first those of the row, then those of the
      column, each as pairs of sine and cosine per frequency.
    """
    exponents = jnp.arange(0, POSITION_DIM, 2, dtype=jnp.float32) / POSITION_DIM

    def waves(number: int) -> jax.Array:
        place = 2 * math.pi * jnp.arange(1, number + 1, dtype=jnp.float32) / (number + 1e-6)
        angle = place[:, None] / POSITION_TEMPERATURE**exponents
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(number, -1)

    rows, columns = (waves(number) for number in grid)
    shape = (*grid, POSITION_DIM)
    return jnp.concatenate(
        [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns, shape)], axis=-1
    )


class PatchEmbed(nnx.Module):
    """3x3 convolutions of stride 2, as many as reduce a patch to a single token."""

    def __init__(
        self, patch_size: int, in_channels: int, dim: int, *, dtype: Dtype | None, rngs: nnx.Rngs
    ) -> None:
        halvings = patch_size.bit_length() - 1
        dims = [in_channels, *(dim >> i for i in reversed(range(halvings)))]
        self.layers = nnx.List(
            ConvNorm(n_in, n_out, 3, stride=2, dtype=dtype, rngs=rngs)
            for n_in, n_out in pairwise(dims)
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, rows, columns, D]; incomplete patches count as patches."""
        x = self.layers[0](images)
        for layer in self.layers[1:]:
            x = layer(jax.nn.gelu(x, approximate=False))
        return x


class XCiT(nnx.Module):
    """Images to features: the class token after the last norm.

    Args:
      patch_size: side of a patch in pixels, 16 or 8.
      embed_dim: width D; a multiple of half the patch size.
      depth: number of XCA blocks, which are followed by two blocks of class attention.
      num_heads: heads of each block; must divide `embed_dim`.
      layer_scale: initial value of LayerScale.
      tokens_norm: apply the second norm of class attention to all tokens, instead of the class
        token only.
      in_channels: channels of the images.
      mlp_ratio: hidden width of the MLP / D.
      drop_path_rate: stochastic depth of every XCA block; class attention has none.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.

    Raises:
      UsageError: invalid or inconsistent sizes, or an unknown `remat`.
    """

    family: ClassVar[str] = "xcit"

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        layer_scale: float,
        tokens_norm: bool = True,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        remat: str = "none",
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_transformer(embed_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        check_counts(in_channels=in_channels)
        check_remat(remat)
        if patch_size not in (8, 16):
            raise UsageError(f"patch_size={patch_size} must be 8 or 16 for an XCiT")
        if embed_dim % (patch_size // 2):
            raise UsageError(
                f"embed_dim={embed_dim} must be a multiple of {patch_size // 2}, half of "
                f"patch_size={patch_size}: change one of them"
            )
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.in_channels = in_channels
        self.remat = remat
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, dtype=dtype, rngs=rngs)
        self.position_projection = conv(2 * POSITION_DIM, embed_dim, 1, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(normal_init(rngs.params(), (1, 1, embed_dim), jnp.float32))
        sizes = (embed_dim, num_heads, mlp_ratio)
        settings = {"layer_scale": layer_scale, "dtype": dtype, "rngs": rngs}
        self.blocks = nnx.List(
            XCABlock(*sizes, drop_path_rate=drop_path_rate, **settings) for _ in range(depth)
        )
        self.class_blocks = nnx.List(
            ClassAttentionBlock(*sizes, tokens_norm=tokens_norm, **settings)
            for _ in range(CLASS_BLOCKS)
        )
        self.norm = layer_norm(embed_dim, dtype=dtype, rngs=rngs)

    def _tokens(self, images: jax.Array, keys: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, N, D]: the class token, and the patches after the XCA blocks."""
        check_images(images, self.in_channels, 1, "one pixel")
        x = self.patch_embed(images)
        batch, rows, columns, dim = x.shape
        grid = rows, columns
        positions = self.position_projection(fourier_positions(grid)[None])
        x = (x + positions.astype(x.dtype)).reshape(batch, -1, dim)
        draws = image_draws(keys, len(self.blocks), branches=3)
        for block, draw in zip(self.blocks, draws, strict=True):
            x = run_block(block, self.remat, x, draw, grid=grid)
        class_tokens = jnp.broadcast_to(self.cls_token[...], (batch, 1, dim))
        return jnp.concatenate([class_tokens.astype(x.dtype), x], axis=1)

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Features of images.

        Args:
          images: [B, H, W, C] float, normalised; any H and W.
          keys: [B] typed PRNG keys for stochastic depth; None disables it.
        Returns: [B, D], float32 (float64 for float64 weights).
        """
        x = self._tokens(images, keys)
        for block in self.class_blocks:
            x = run_block(block, self.remat, x)
        return at_least_float32(self.norm(x[:, 0]))

    def get_last_selfattention(self, images: jax.Array) -> jax.Array:
        """Attention weights of the last block: [B, H, W, C] -> [B, h, 1, N].

        Unlike in a ViT, where each of the N tokens is a query, only the class token is one.
        """
        x = self._tokens(images, None)
        for block in self.class_blocks[:-1]:
            x = block(x)
        last = self.class_blocks[-1]
        q, k, _ = last.attn.queries_keys_values(last.norm1(x))
        return last.attn.weights(q[:, :, :1], k)


_SIZES = {
    "xcit_nano_12": partial(
        XCiT, embed_dim=128, depth=12, num_heads=4, layer_scale=1.0, tokens_norm=False
    ),
    "xcit_tiny_12": partial(XCiT, embed_dim=192, depth=12, num_heads=4, layer_scale=1.0),
    "xcit_tiny_24": partial(XCiT, embed_dim=192, depth=24, num_heads=4, layer_scale=1e-5),
    "xcit_small_12": partial(XCiT, embed_dim=384, depth=12, num_heads=8, layer_scale=1.0),
    "xcit_small_24": partial(XCiT, embed_dim=384, depth=24, num_heads=8, layer_scale=1e-5),
    "xcit_medium_24": partial(XCiT, embed_dim=512, depth=24, num_heads=8, layer_scale=1e-5),
    "xcit_large_24": partial(XCiT, embed_dim=768, depth=24, num_heads=16, layer_scale=1e-5),
}

ARCHITECTURES = {
    f"{name}_p{patch_size}": partial(build, patch_size=patch_size)
    for name, build in _SIZES.items()
    for patch_size in (16, 8)
}
