"""Residual sums that XLA's CPU compiler computes once.

That compiler recomputes a cheap sum in each operation that reads it. The gradient of the residual
stream is a sum over all later blocks, read three times in each block, so its cost grew with the
square of the depth: most of a step at depth 12 (benchmarks/README.md). An optimization barrier
after each sum prevents this. JAX 0.10 removes barriers before it fuses operations; see
`step.compiler_options`.
"""

import jax
from jax import lax


def add_branch(x: jax.Array, branch: jax.Array) -> jax.Array:
    """x + branch, with a barrier on CPUs so that neither it nor its gradient is recomputed."""
    return lax.platform_dependent(
        x + branch, cpu=lax.optimization_barrier, default=lambda total: total
    )
