"""Steps of our optimizers, and of the same formulas in NumPy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.training import optim

PyTree = Any
Arrays = dict[str, np.ndarray]
STEPS = 6
LEARNING_RATES = np.linspace(0.1, 0.03, STEPS)
WEIGHT_DECAYS = np.linspace(0.04, 0.4, STEPS)
SHAPES = {
    "backbone/cls_token": (1, 1, 6),
    "backbone/pos_embed": (1, 5, 6),
    "backbone/norm/scale": (6,),
    "backbone/fc/kernel": (6, 4),
    "backbone/fc/bias": (4,),
    "head/last_layer/v": (4, 8),
    "head/last_layer/g": (1, 8),
}
DECAYED = {"backbone/cls_token", "backbone/pos_embed", "backbone/fc/kernel"}
DECAYED |= {"head/last_layer/v", "head/last_layer/g"}
LAST_LAYER = {"head/last_layer/v", "head/last_layer/g"}


def nested(flat: Arrays) -> PyTree:
    """Builds a tree from arrays named by their paths."""
    tree: PyTree = {}
    for name, array in flat.items():
        *sections, last = name.split("/")
        functools.reduce(lambda t, s: t.setdefault(s, {}), sections, tree)[last] = jnp.asarray(
            array
        )
    return tree


def flattened(tree: PyTree) -> Arrays:
    """The arrays of a tree, named by their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(p.key for p in path): np.asarray(leaf) for path, leaf in flat}


def random_arrays(seed: int, scale: float = 1.0) -> Arrays:
    """Random arrays with a shape for each kind of parameter."""
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(step: int) -> Arrays:
    """The gradients of a step; they do not depend on the parameters."""
    return random_arrays(100 + step, scale=0.3)


def run(
    name: str,
    *,
    clip_grad: float = 0.0,
    norm_last_layer: bool = False,
    frozen_steps: int = 0,
) -> list[tuple[Arrays, PyTree]]:
    """Parameters and optimizer state after 0, 1, ... steps, in float64."""
    with jax.enable_x64(True):
        tx = optim.make_optimizer(name, clip_grad=clip_grad, norm_last_layer=norm_last_layer)

        @jax.jit
        def update(
            grads: PyTree, state: PyTree, params: PyTree, **now: Any
        ) -> tuple[PyTree, PyTree]:
            updates, state = tx.update(grads, state, params, **now)
            return jax.tree.map(jnp.add, params, updates), state

        params = nested(random_arrays(0))
        state = tx.init(params)
        history = [(flattened(params), state)]
        for step in range(STEPS):
            params, state = update(
                nested(gradients(step)),
                state,
                params,
                learning_rate=LEARNING_RATES[step],
                weight_decay=WEIGHT_DECAYS[step],
                frozen=step < frozen_steps,
            )
            history.append((flattened(params), state))
    return history


# Formulas for one tensor: (p, g, memory, count from 1, lr, decay) -> p; they change `memory`.


def adamw(p: Any, g: Any, memory: dict, count: int, lr: float, decay: float) -> Any:
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
    return p - lr * m_hat / (np.sqrt(v_hat) + 1e-8) - lr * decay * p


def sgd(p: Any, g: Any, memory: dict, count: int, lr: float, decay: float) -> Any:
    buffer = memory["buffer"] = 0.9 * memory.get("buffer", 0) + g + decay * p
    return p - lr * buffer


def lars(p: Any, g: Any, memory: dict, count: int, lr: float, decay: float) -> Any:
    d = g
    if p.ndim != 1:
        d = d + decay * p
        d = 0.001 * np.linalg.norm(p) / np.linalg.norm(d) * d
    buffer = memory["buffer"] = 0.9 * memory.get("buffer", 0) + d
    return p - lr * buffer


FORMULAS: dict[str, Callable] = {"adamw": adamw, "sgd": sgd, "lars": lars}


def expected_params(name: str, frozen_steps: int = 0) -> Arrays:
    """The parameters after all steps, according to the formula."""
    params, memories = random_arrays(0), {key: {} for key in SHAPES}
    for step in range(STEPS):
        grads = gradients(step)
        for key in SHAPES:
            took_part = step - (frozen_steps if key in LAST_LAYER else 0)
            if took_part >= 0:
                decay = WEIGHT_DECAYS[step] if key in DECAYED else 0.0
                params[key] = FORMULAS[name](
                    params[key],
                    grads[key],
                    memories[key],
                    took_part + 1,
                    LEARNING_RATES[step],
                    decay,
                )
    return params


def assert_equal_params(found: Arrays, expected: Arrays) -> None:
    """Asserts equal names, and equal values up to rounding in float64."""
    assert found.keys() == expected.keys()
    for key, array in found.items():
        np.testing.assert_allclose(array, expected[key], rtol=1e-10, atol=1e-14, err_msg=key)
