"""DINO, self-distillation with no labels (Caron et al., arXiv 2104.14294), in JAX.

`create_model` builds a backbone with random weights; `load`, `load_with_head` and `load_linear`
load trained weights. `dino-jax COMMAND`, also `python -m dino_jax COMMAND`, trains and evaluates.
"""

import importlib
from typing import Any

_MODULES = {
    "create_model": "dino_jax.models",
    "load": "dino_jax.weights.load",
    "load_linear": "dino_jax.weights.linear",
    "load_with_head": "dino_jax.weights.load",
}
__all__ = ["create_model", "load", "load_linear", "load_with_head"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import dino_jax` stays fast.
    if name == "__version__":
        from importlib.metadata import version

        return version("dino_jax")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
