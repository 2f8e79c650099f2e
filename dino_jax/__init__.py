"""DINO, self-distillation with no labels (Caron et al., arXiv 2104.14294), in JAX.

`create_model` builds a backbone with random weights, `load` one with trained ones. Training is
`python main.py`, every other job `python -m dino_jax JOB`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["create_model", "load"]


def __getattr__(name: str) -> Any:
    # On demand: importing the package alone stays quick.
    if name == "create_model":
        from dino_jax.models import create_model

        return create_model
    if name == "load":
        from dino_jax.weights.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
