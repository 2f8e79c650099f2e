"""The one way in which the package compiles a function of a frozen backbone."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from dino_jax import sharding

PyTree = Any


def compile_backbone(
    function: Callable[..., PyTree],
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    *,
    donate_argnums: tuple[int, ...] = (),
) -> Callable[..., PyTree]:
    """Compiles a function of a backbone and arrays.

    Args:
      function: maps (backbone, *arrays) to a tree of arrays.
      graphdef: of the backbone, in evaluation mode.
      mesh: devices that share the work.
      donate_argnums: arguments of the compiled function whose buffers it may reuse.
    Returns: the compiled function of (params, batch_stats, *arrays). Its results are replicated on
      all devices and hosts.
    """
    replicated = sharding.replicated(mesh)

    def run(params: PyTree, batch_stats: PyTree, *arrays: PyTree) -> PyTree:
        # The weights of a training run may be sharded: gather each of them once.
        params = jax.lax.with_sharding_constraint(params, replicated)
        model = nnx.merge(graphdef, params, batch_stats)
        # By default, accelerators round the operands of float32 products.
        with jax.default_matmul_precision("highest"):
            return function(model, *arrays)

    return jax.jit(run, out_shardings=replicated, donate_argnums=donate_argnums)
