"""Residual sums stay whole in the program that XLA's CPU back end compiles."""

import re

import jax
import jax.numpy as jnp
import pytest

from dino_jax.models.residual import add_branch
from dino_jax.training.step import compiler_options


def most_operands(depth: int, options: dict[str, str]) -> int:
    """Most operands of any fusion in the compiled gradient of `depth` residual layers."""

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for weight in weights:
            normed = x - x.mean(axis=-1, keepdims=True)
            x = add_branch(x, jnp.tanh(normed @ weight))
        return jnp.sum(x**2)

    arguments = [jnp.ones((8, 8))] * depth, jnp.ones((4, 8))
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments)
    program = lowered.compile(compiler_options=options).as_text()
    return max(len(call.split(",")) for call in re.findall(r"fusion\(([^)]*)\)", program))


@pytest.mark.compiler
def test_no_operation_sums_over_all_later_layers() -> None:
    assert (
        most_operands(12, compiler_options("cpu")) <= most_operands(4, compiler_options("cpu")) + 1
    )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="from JAX 0.11 on barriers last")
@pytest.mark.compiler
def test_without_the_options_it_would() -> None:
    """Else the options are not needed, or not known to this version of XLA."""
    assert most_operands(12, {}) > most_operands(4, {}) + 4


def test_values_and_gradients_are_those_of_a_sum() -> None:
    x, branch = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    assert jnp.array_equal(add_branch(x, branch), x + branch)
    gradients = jax.grad(lambda *a: jnp.sum(add_branch(*a) ** 2), argnums=(0, 1))(x, branch)
    assert all(jnp.array_equal(g, 2 * (x + branch)) for g in gradients)
