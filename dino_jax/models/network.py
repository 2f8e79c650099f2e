"""Backbone and head as one pure function of their parameters.

Dims: B images, V views of one group, C channels, D width, K prototypes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PyTree = Any


class MultiCropModel(nnx.Module):
    """A backbone over views of several sizes, and the head once over all their features."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module) -> None:
        self.backbone = backbone
        self.head = head

    def __call__(self, views: Sequence[jax.Array], keys: jax.Array | None) -> jax.Array:
        """Logits of all views: groups of [B, V, H, W, C] -> [B, sum of V, K].

        The batch axis stays first throughout: it is the sharded one, and joining the views behind
        it moves nothing between devices.
        """
        features, first = [], 0
        for group in views:
            batch, number = group.shape[:2]
            group_keys = None
            if keys is not None:
                fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
                group_keys = fold(keys, first + jnp.arange(number)).reshape(-1)
            output = self.backbone(group.reshape(batch * number, *group.shape[2:]), group_keys)
            features.append(output.reshape(batch, number, -1))
            first += number
        joined = jnp.concatenate(features, axis=1)
        logits = self.head(joined.reshape(-1, joined.shape[-1]))
        return logits.reshape(*joined.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Network:
    """The structure of a model without its arrays; calling it is a pure function."""

    graphdef: nnx.GraphDef

    def __call__(
        self,
        params: PyTree,
        batch_stats: PyTree,
        views: Sequence[jax.Array],
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Logits of every view, and the BatchNorm statistics after this pass.

        Args:
          params: pure dict of parameters, as `split` returns it.
          batch_stats: pure dict of running statistics, empty for networks without BatchNorm.
          views: groups of views of one size, each [B, V, H, W, C], global crops first.
          keys: [B] PRNG keys, one per image, for stochastic depth; None disables it.
        Returns: ([B, sum of V, K] float32, batch_stats).
        """
        model = nnx.merge(self.graphdef, params, batch_stats)
        logits = model(views, keys)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Splits a module into its structure, parameters and running statistics, both as pure dicts."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Like `split(build(...))`, but with shapes only: no array is allocated."""
    return split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
