"""The blocks of an XCiT (El-Nouby et al., 2021, arXiv 2106.09681).

Dims: B images, N tokens (the class token first if there is one, then the patches row by row), D
width, h heads, d = D / h.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.models.attention import Attention
from dino_jax.models.batch_norm import BatchNorm
from dino_jax.models.conv import conv
from dino_jax.models.layers import Mlp, drop_path, layer_norm, unit
from dino_jax.models.residual import add_branch


def _layer_scale(gamma: nnx.Param, branch: jax.Array) -> jax.Array:
    return (gamma[...] * branch).astype(branch.dtype)  # bfloat16 would round the factors


class CrossCovarianceAttention(Attention):
    """Attention between the channels of each head instead of between tokens (section 3.2)."""

    def __init__(self, dim: int, num_heads: int, *, dtype: Dtype | None, rngs: nnx.Rngs) -> None:
        super().__init__(dim, num_heads, dtype=dtype, rngs=rngs)
        self.temperature = nnx.Param(jnp.ones((num_heads, 1, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]; normalisation and softmax in float32."""
        q, k, v = self.queries_keys_values(x)  # [B, h, N, d]
        covariance = jnp.matmul(
            unit(q, axis=-2).astype(q.dtype).swapaxes(-1, -2),
            unit(k, axis=-2).astype(k.dtype),
            preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
        )
        weights = jax.nn.softmax(covariance * self.temperature[...], axis=-1)  # [B, h, d, d]
        mixed = v @ weights.astype(v.dtype).swapaxes(-1, -2)
        return self.proj(mixed.swapaxes(1, 2).reshape(x.shape))


class LocalPatchInteraction(nnx.Module):
    """Two depthwise 3x3 convolutions over the grid of tokens (section 3.3)."""

    def __init__(self, dim: int, *, dtype: Dtype | None, rngs: nnx.Rngs) -> None:
        depthwise = partial(conv, dim, dim, 3, groups=dim, dtype=dtype, rngs=rngs)
        self.conv1 = depthwise()
        self.norm = BatchNorm(dim, dtype=dtype, rngs=rngs)
        self.conv2 = depthwise()

    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """[B, N, D] -> [B, N, D], where N = rows * columns of the grid."""
        image = self.conv1(x.reshape(x.shape[0], *grid, x.shape[-1]))
        return self.conv2(self.norm(jax.nn.gelu(image, approximate=False))).reshape(x.shape)


class XCABlock(nnx.Module):
    """Cross-covariance attention, local interaction, MLP, each with LayerScale and drop path.

    Numbered as in the reference: 1 is attention, 2 the MLP, and 3 the local interaction, which
    runs before 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        layer_scale: float,
        drop_path_rate: float,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.drop_path_rate = drop_path_rate
        self.gamma1 = nnx.Param(jnp.full(dim, layer_scale))
        self.gamma2 = nnx.Param(jnp.full(dim, layer_scale))
        self.gamma3 = nnx.Param(jnp.full(dim, layer_scale))
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = CrossCovarianceAttention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.local = LocalPatchInteraction(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, draws: jax.Array | None, *, grid: tuple[int, int]
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D], without class token.

        `draws` are [B, 3] uniform numbers that decide which branches to drop; None drops none.
        """
        draw1, draw2, draw3 = (None, None, None) if draws is None else draws.T
        rate = self.drop_path_rate
        attended = self.attn(self.norm1(x))
        x = add_branch(x, drop_path(_layer_scale(self.gamma1, attended), draw1, rate))
        neighbours = self.local(self.norm3(x), grid)
        x = add_branch(x, drop_path(_layer_scale(self.gamma3, neighbours), draw3, rate))
        mixed = self.mlp(self.norm2(x))
        return add_branch(x, drop_path(_layer_scale(self.gamma2, mixed), draw2, rate))


class ClassAttentionBlock(nnx.Module):
    """Class attention: the class token attends to all tokens (Touvron et al., arXiv 2103.17239).

    Only the class token passes through attention and MLP. As in the reference, the patches change
    too: each branch adds their own values to them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        layer_scale: float,
        tokens_norm: bool,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.tokens_norm = tokens_norm
        self.gamma1 = nnx.Param(jnp.full(dim, layer_scale))
        self.gamma2 = nnx.Param(jnp.full(dim, layer_scale))
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D], class token first."""
        normed = self.norm1(x)
        attended = jnp.concatenate([self.attn(normed, class_only=True), normed[:, 1:]], axis=1)
        x = x + _layer_scale(self.gamma1, attended)
        if self.tokens_norm:
            x = self.norm2(x)
        else:
            x = jnp.concatenate([self.norm2(x[:, :1]), x[:, 1:]], axis=1)
        class_branch = _layer_scale(self.gamma2, self.mlp(x[:, :1]))
        return x + jnp.concatenate([class_branch, x[:, 1:]], axis=1)
