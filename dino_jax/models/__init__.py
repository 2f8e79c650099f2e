"""Architectures by name."""

import re
from functools import partial
from inspect import signature
from typing import Any

from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import resnet, vit, xcit
from dino_jax.models.head import DINOHead
from dino_jax.models.resnet import ResNet
from dino_jax.models.vit import VisionTransformer
from dino_jax.models.xcit import XCiT

__all__ = ["MODELS", "DINOHead", "ResNet", "VisionTransformer", "XCiT", "create_model"]

# Classes with the sizes of each published architecture.
MODELS: dict[str, partial[nnx.Module]] = {
    **vit.ARCHITECTURES,
    **xcit.ARCHITECTURES,
    **resnet.ARCHITECTURES,
}


def default_settings(name: str) -> dict[str, Any]:
    """The default of every setting of a registered architecture."""
    build = MODELS[name]
    parameters = signature(build.func.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | build.keywords


def create_model(
    name: str, *, patch_size: int | None = None, rngs: nnx.Rngs | None = None, **overrides: Any
) -> nnx.Module:
    """Builds a backbone with random weights, in evaluation mode.

    Args:
      name: a key of `MODELS`.
      patch_size: side of a patch in pixels. A ViT takes any, 16 if not given; an XCiT has it in
        its name, and a ResNet has none.
      rngs: source of the weights; seed 0 if not given.
      **overrides: any setting of the architecture's class, such as embed_dim, depth, num_heads,
        image_size, in_channels, drop_path_rate, dtype or remat.
    Returns: a module that maps [B, H, W, C] float32, normalised, to features [B, D].
    Raises:
      UsageError: an unknown name, a setting that the architecture does not have, or sizes that do
        not fit.

    Example:
      model = create_model("vit_small", patch_size=16)
      features = model(jnp.zeros((1, 224, 224, 3)))  # [1, 384]
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    if patch_size is not None:
        overrides["patch_size"] = patch_size
    build = MODELS[name]
    known = signature(build.func.__init__).parameters.keys() - {"self", "rngs"}
    if foreign := sorted(overrides.keys() - known):
        raise UsageError(
            f"{name} has no {' and no '.join(foreign)}: leave it unset, or at 0; its settings are "
            f"{', '.join(sorted(known))}"
        )
    if (named := re.search(r"_p(\d+)$", name)) and patch_size not in (None, int(named[1])):
        raise UsageError(
            f"patch_size={patch_size} contradicts the name {name}: leave it unset, or choose "
            "another name"
        )
    model = build(rngs=nnx.Rngs(0) if rngs is None else rngs, **overrides)
    model.eval()
    return model
