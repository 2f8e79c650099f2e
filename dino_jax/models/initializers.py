"""The distributions that weights are drawn from at first."""

import jax
from flax import nnx

# Torch truncates this normal at +-2, a hundred standard deviations: no truncation at all.
normal_init = nnx.initializers.normal(0.02)


def torch_uniform_init(fan_in: int) -> nnx.Initializer:
    """Torch's default for linear and convolutional layers: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
