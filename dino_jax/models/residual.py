"""Residual sums, and what XLA's CPU back end has to be told about them.

That back end computes a cheap sum anew inside each operation that reads it. The gradient of the
residual stream is a sum over all later blocks, read three times in each block, so its cost grew
with the square of the depth: most of a step at depth 12 (benchmarks/README.md). A barrier behind
each sum keeps it whole, as long as the compiler does not remove the barriers before it fuses, as it
does with JAX 0.10.
"""

import jax


def add_branch(x: jax.Array, branch: jax.Array) -> jax.Array:
    """x + branch, computed once in the forward pass, and its gradient once in the backward pass.

    Other back ends weigh what computing something twice costs; they get the sum alone.
    """
    total = x + branch
    return jax.lax.optimization_barrier(total) if jax.default_backend() == "cpu" else total
