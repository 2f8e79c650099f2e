"""What the backward passes of GELU and LayerNorm keep."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dino_jax.models.layers import gelu, layer_norm

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
