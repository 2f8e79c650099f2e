"""Architectures by name."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import vit
from dino_jax.models.head import DINOHead
from dino_jax.models.vit import VisionTransformer

__all__ = ["MODELS", "DINOHead", "VisionTransformer", "create_model"]

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "deit_tiny": vit.vit_tiny,
    "deit_small": vit.vit_small,
    "deit_base": vit.vit_base,
}


def create_model(
    name: str, *, patch_size: int = 16, rngs: nnx.Rngs | None = None, **overrides: Any
) -> nnx.Module:
    """Builds a backbone with random weights, in evaluation mode.

    Args:
      name: a key of `MODELS`.
      patch_size: side of a patch in pixels.
      rngs: source of the weights; seed 0 if not given.
      **overrides: any setting of the architecture's class, such as embed_dim, depth, num_heads,
        image_size, in_channels, drop_path_rate, dtype or remat.
    Returns: a module that maps [B, H, W, C] float32, normalised, to features [B, D].
    Raises:
      UsageError: an unknown name, or sizes that do not fit.

    Example:
      model = create_model("vit_small", patch_size=16)
      features = model(jnp.zeros((1, 224, 224, 3)))  # [1, 384]
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    rngs = nnx.Rngs(0) if rngs is None else rngs
    model = MODELS[name](patch_size=patch_size, rngs=rngs, **overrides)
    model.eval()
    return model
