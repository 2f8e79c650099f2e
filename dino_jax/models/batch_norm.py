"""Batch normalisation with torch's running statistics."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from dino_jax.sharding import device_axes


class BatchNorm(nnx.Module):
    """Batch normalisation over every axis but the last (Ioffe & Szegedy, arXiv 1502.03167).

    Unlike in `nnx.BatchNorm`, the running variance is the unbiased estimate, as in torch. If the
    batch is sharded, the statistics are those of the global batch. After `train()` the module
    normalises with the statistics of the batch and updates the running ones; after `eval()` it
    normalises with the running statistics.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        del rngs  # the initial values are constants
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., F]; statistics in float32 or wider."""
        stats_dtype = jnp.promote_types(x.dtype, self.mean.dtype)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes, devices = tuple(range(x.ndim - 1)), device_axes()
            wide = x.astype(stats_dtype)
            mean = jax.lax.pmean(wide.mean(axes), devices)
            var = jax.lax.pmean(jnp.square(wide - mean).mean(axes), devices)
            count = jax.lax.psum(x.size // x.shape[-1], devices)
            unbiased = var * (count / max(count - 1, 1))
            self.mean[...] = self._moved(self.mean[...], mean)
            self.var[...] = self._moved(self.var[...], unbiased)
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        y = (x.astype(stats_dtype) - mean) * scale + self.bias[...]
        return y.astype(self.dtype or y.dtype)

    def _moved(self, running: jax.Array, batch: jax.Array) -> jax.Array:
        batch = jax.lax.stop_gradient(batch).astype(running.dtype)
        return self.momentum * running + (1.0 - self.momentum) * batch
