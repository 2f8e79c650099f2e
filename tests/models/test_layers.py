"""What the backward passes of GELU and LayerNorm keep, and the check of input images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import create_model
from dino_jax.models.layers import check_images, gelu, layer_norm
from tests.support.tiny_vit import tiny

X = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)


@pytest.mark.parametrize(
    ("layer", "others"),
    [(gelu, 0), (layer_norm(8, dtype=None, rngs=nnx.Rngs(0)), 2 * 8)],
    ids=["gelu", "layer_norm"],
)
def test_the_backward_pass_keeps_the_input_alone(
    layer: Callable[[jax.Array], jax.Array], others: int
) -> None:
    """And parameters: activations are most of a step's memory (benchmarks/README.md)."""
    pull_back = jax.eval_shape(lambda x: jax.vjp(layer, x)[1], X)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size > 1]
    assert sum(leaf.size for leaf in kept) <= X.size + others, kept


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "bool", "complex64"])
def test_images_must_be_floating_point(dtype: str) -> None:
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), dtype)
    with pytest.raises(UsageError, match=rf"images of dtype {dtype} .*`info\.preprocess`"):
        check_images(images, 3, 1, "one pixel")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floating_point_images_of_any_width_are_accepted(dtype: str) -> None:
    check_images(jax.ShapeDtypeStruct((1, 16, 16, 3), dtype), 3, 1, "one pixel")


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (16, 16, 3), (1, 16, 16, 1), (1, 16, 16, 4)])
def test_images_of_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"it takes \[B, H, W, 3\]"):
        check_images(jax.ShapeDtypeStruct(shape, "float32"), 3, 1, "one pixel")


@pytest.mark.parametrize("name", ["vit", "resnet18", "xcit_nano_12_p16"])
def test_models_reject_integers_when_traced(name: str) -> None:
    # Not inside the trace: the model is cached, and other tests would get its tracers.
    model = tiny() if name == "vit" else nnx.eval_shape(lambda: create_model(name))
    with pytest.raises(UsageError, match="images of dtype uint8"):
        jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.uint8))
