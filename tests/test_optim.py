"""Optimizers against their formulas in NumPy, and against torch where that is installed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax import optim
from dino_jax.errors import UsageError
from dino_jax.models import DINOHead, VisionTransformer
from dino_jax.models.network import MultiCropModel, abstract

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
    tree: PyTree = {}
    for name, array in flat.items():
        *sections, last = name.split("/")
        functools.reduce(lambda t, s: t.setdefault(s, {}), sections, tree)[last] = jnp.asarray(
            array
        )
    return tree


def flattened(tree: PyTree) -> Arrays:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(p.key for p in path): np.asarray(leaf) for path, leaf in flat}


def random_arrays(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(step: int) -> Arrays:
    return random_arrays(100 + step, scale=0.3)


def run(
    name: str,
    *,
    clip_grad: float = 0.0,
    norm_last_layer: bool = False,
    frozen_steps: int = 0,
) -> list[tuple[Arrays, PyTree]]:
    """Parameters and optimizer state after each number of steps, from 0 on, in float64."""
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


# The formulas, for one tensor: (p, g, memory, count from 1, lr, decay) -> p; memory is changed.


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
    assert found.keys() == expected.keys()
    for key, array in found.items():
        np.testing.assert_allclose(array, expected[key], rtol=1e-10, atol=1e-14, err_msg=key)


@pytest.mark.parametrize("frozen_steps", [0, 2])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_steps_equal_the_formula(name: str, frozen_steps: int) -> None:
    found, _ = run(name, frozen_steps=frozen_steps)[-1]
    assert_equal_params(found, expected_params(name, frozen_steps))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_equal_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = random_arrays(0)
    tensors = {key: torch.tensor(array, requires_grad=True) for key, array in arrays.items()}
    kept = [tensor for key, tensor in tensors.items() if key not in DECAYED]
    groups = [{"params": [tensors[key] for key in sorted(DECAYED)]}, {"params": kept}]
    theirs = (
        torch.optim.AdamW(groups)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0, momentum=0.9)
    )
    for step in range(STEPS):
        theirs.param_groups[0]["weight_decay"] = WEIGHT_DECAYS[step]
        theirs.param_groups[1]["weight_decay"] = 0.0
        for group in theirs.param_groups:
            group["lr"] = LEARNING_RATES[step]
        for key, gradient in gradients(step).items():
            tensors[key].grad = torch.tensor(gradient)
        theirs.step()
    found, _ = run(name)[-1]
    assert_equal_params(found, {key: t.detach().numpy() for key, t in tensors.items()})


# Decay and clipping


@pytest.fixture(scope="module")
def vit_and_head() -> PyTree:
    def build(rngs: nnx.Rngs) -> MultiCropModel:
        backbone = VisionTransformer(
            patch_size=4, image_size=8, embed_dim=8, depth=1, num_heads=2, rngs=rngs
        )
        return MultiCropModel(backbone, DINOHead(8, 16, hidden_dim=8, use_bn=True, rngs=rngs))

    return abstract(build)[1]


def named(tree: PyTree) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(p.key) for p in path): leaf for path, leaf in flat}


def test_decay_mask_of_a_vit_and_head(vit_and_head: PyTree) -> None:
    mask = named(optim.decay_mask(vit_and_head))
    assert {name.rsplit(".", 1)[-1] for name, decayed in mask.items() if not decayed} == {
        "bias",
        "scale",
    }
    decayed = {name for name, decayed in mask.items() if decayed}
    assert {name.rsplit(".", 1)[-1] for name in decayed} == {
        "kernel", "cls_token", "pos_embed", "g", "v"
    }  # fmt: skip
    assert not any(name.endswith(("bias", "scale")) for name in decayed)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_groups_of_a_vit_and_head(vit_and_head: PyTree, norm_last_layer: bool) -> None:
    labels = optim.parameter_labels(vit_and_head, norm_last_layer=norm_last_layer)
    special = {name: label for name, label in named(labels).items() if label != "body"}
    g = "fixed" if norm_last_layer else "last_layer"
    assert special == {"head.last_layer.g": g, "head.last_layer.v": "last_layer"}


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    grads = {"large": np.full((3, 4), 2.0), "small": np.full(5, 0.1), "zero": np.zeros(2)}
    tx = optim.clip_by_parameter_norm(1.5)
    clipped, _ = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(grads), None)
    norm = np.linalg.norm(grads["large"])
    np.testing.assert_allclose(clipped["large"], grads["large"] * 1.5 / (norm + 1e-6), rtol=1e-6)
    np.testing.assert_array_equal(clipped["small"], grads["small"].astype(np.float32))
    np.testing.assert_array_equal(clipped["zero"], grads["zero"])


def test_clipping_comes_before_the_optimizer_and_0_switches_it_off() -> None:
    # One step of SGD moves 1-D tensors by the learning rate times the clipped gradient.
    start = random_arrays(0)
    for limit in (0.0, 0.5, 1e6):
        moved, _ = run("sgd", clip_grad=limit)[1]
        for key, gradient in gradients(0).items():
            factor = min(1, limit / (np.linalg.norm(gradient) + 1e-6)) if limit else 1
            decay = WEIGHT_DECAYS[0] if key in DECAYED else 0
            step = LEARNING_RATES[0] * (factor * gradient + decay * start[key])
            np.testing.assert_allclose(start[key] - moved[key], step, rtol=1e-9, err_msg=key)


def test_lars_leaves_an_update_alone_where_a_norm_is_zero() -> None:
    tx = optim.lars()
    params = {"zero": jnp.zeros((2, 3)), "other": jnp.ones((2, 3))}
    grads = {"zero": jnp.full((2, 3), 0.5), "other": jnp.zeros((2, 3))}
    updates, _ = tx.update(grads, tx.init(params), params, learning_rate=1.0, weight_decay=0.0)
    np.testing.assert_array_equal(updates["zero"], -grads["zero"])
    np.testing.assert_array_equal(updates["other"], grads["other"])


# The last layer


def state_of(history: list[tuple[Arrays, PyTree]], steps: int, group: str) -> list[np.ndarray]:
    groups = history[steps][1][1].inner_states  # behind the clipping
    return [np.asarray(leaf) for leaf in jax.tree.leaves(groups[group])]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_frozen_last_layer_stands_still_with_its_state(name: str) -> None:
    history = run(name, frozen_steps=3)
    start = history[0][0]
    for steps in (1, 2, 3):
        params = history[steps][0]
        for key in SHAPES:
            still = np.array_equal(params[key], start[key])
            assert still == (key in LAST_LAYER), (steps, key)
        for old, new in zip(
            state_of(history, 0, "last_layer"),
            state_of(history, steps, "last_layer"),
            strict=True,
        ):
            np.testing.assert_array_equal(old, new)
    assert all((history[4][0][key] != start[key]).any() for key in LAST_LAYER)


def test_bias_correction_of_the_last_layer_starts_when_it_thaws() -> None:
    history = run("adamw", frozen_steps=3)
    counts = {
        group: [
            [int(x) for x in state_of(history, steps, group) if x.ndim == 0]
            for steps in range(STEPS + 1)
        ]
        for group in ("body", "last_layer")
    }
    assert counts["body"] == [[n] for n in range(STEPS + 1)]
    assert counts["last_layer"] == [[max(n - 3, 0)] for n in range(STEPS + 1)]
    # Adam's first update is the sign of the gradient, times the learning rate.
    change = history[4][0]["head/last_layer/v"] - history[3][0]["head/last_layer/v"]
    decay = LEARNING_RATES[3] * WEIGHT_DECAYS[3] * history[3][0]["head/last_layer/v"]
    expected = -LEARNING_RATES[3] * np.sign(gradients(3)["head/last_layer/v"])
    np.testing.assert_allclose(change + decay, expected, rtol=1e-5)  # eps is not nothing


def test_moments_survive_a_freeze_bit_for_bit() -> None:
    tx = optim.hold_while_frozen(optim.adamw())
    params, grads = jnp.ones((2, 3)), jnp.full((2, 3), 0.1)
    now = {"learning_rate": 0.1, "weight_decay": 0.1}
    _, before = tx.update(grads, tx.init(params), params, frozen=False, **now)
    updates, after = tx.update(100 * grads, before, params, frozen=True, **now)
    assert not updates.any()
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_fixed_norms_never_move_and_have_no_state(name: str) -> None:
    history = run(name, norm_last_layer=True)
    np.testing.assert_array_equal(
        history[-1][0]["head/last_layer/g"], history[0][0]["head/last_layer/g"]
    )
    assert (1, 8) not in {x.shape for x in jax.tree.leaves(history[-1][1])}
    free = expected_params(name)  # the others do not notice
    free["head/last_layer/g"] = history[0][0]["head/last_layer/g"]
    assert_equal_params(history[-1][0], free)


def test_an_unknown_optimizer_lists_the_choices() -> None:
    with pytest.raises(
        UsageError, match="unknown optimizer 'adam': choose one of adamw, sgd, lars"
    ):
        optim.make_optimizer("adam", clip_grad=0.0, norm_last_layer=True)
