"""The transformer block of a ViT.

Dims: B images, N tokens (class token first), M queries, D width, h heads, d = D / h.
"""

import math

import jax
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.attention import Attention
from dino_jax.models.layers import Mlp, check_counts, drop_path, layer_norm
from dino_jax.models.residual import add_branch


def check_transformer(
    embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, drop_path_rate: float
) -> None:
    """Raises UsageError for invalid or inconsistent sizes of a transformer."""
    check_counts(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    if embed_dim % num_heads:
        raise UsageError(
            f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}: "
            "change one of them, so that all heads have the same width"
        )
    if not math.isfinite(mlp_ratio) or round(embed_dim * mlp_ratio) < 1:
        raise UsageError(
            f"mlp_ratio={mlp_ratio} must give the MLP a finite width of at least 1; 4 is usual"
        )
    if not 0.0 <= drop_path_rate < 1.0:
        raise UsageError(f"drop_path_rate={drop_path_rate} must be at least 0 and below 1")


class Block(nnx.Module):
    """A pre-norm transformer block with stochastic depth on both residual branches.

    Args:
      dim: width D.
      num_heads: attention heads; must divide D.
      mlp_ratio: hidden width of the MLP / D.
      drop_path_rate: probability that an image skips a branch.
      attention: a kernel of `dino_jax.models.attention.KERNELS`.
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        drop_path_rate: float,
        attention: str = "xla",
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.drop_path_rate = drop_path_rate
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, num_heads, kernel=attention, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, draws: jax.Array | None, *, class_only: bool = False
    ) -> jax.Array:
        """Runs the block.

        Args:
          x: [B, N, D].
          draws: [B, 2] uniform numbers that decide which branches to drop; None drops none.
          class_only: compute only the class token's output, which is the same but cheaper.
        Returns: [B, N, D], or [B, 1, D] with `class_only`.
        """
        draw1, draw2 = (None, None) if draws is None else (draws[:, 0], draws[:, 1])
        attended = self.attn(self.norm1(x), class_only=class_only)
        x = x[:, :1] if class_only else x
        x = add_branch(x, drop_path(attended, draw1, self.drop_path_rate))
        return add_branch(x, drop_path(self.mlp(self.norm2(x)), draw2, self.drop_path_rate))
