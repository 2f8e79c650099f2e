"""A tiny Vision Transformer with weights from the goldens' recipe."""

from functools import partial
from typing import Any

from dino_jax.models import VisionTransformer
from tests.support.reference import call, recipe_model

TINY = {"patch_size": 4, "image_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}


def tiny(**overrides: Any) -> VisionTransformer:
    """For images of 16 pixels in patches of 4, so 17 tokens; two blocks of width 32."""
    return recipe_model("vit_tiny", **TINY | overrides)


features = partial(call, VisionTransformer.__call__)
