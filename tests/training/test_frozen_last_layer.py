"""The last layer during and after its freeze, and its norms, which may be fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.training import optim
from tests.support.optimizer_steps import (
    LAST_LAYER,
    LEARNING_RATES,
    SHAPES,
    STEPS,
    WEIGHT_DECAYS,
    Arrays,
    PyTree,
    assert_equal_params,
    expected_params,
    gradients,
    run,
)


def state_of(history: list[tuple[Arrays, PyTree]], steps: int, group: str) -> list[np.ndarray]:
    groups = history[steps][1][1].inner_states  # [1] skips the clipping
    return [np.asarray(leaf) for leaf in jax.tree.leaves(groups[group])]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_frozen_last_layer_and_its_state_do_not_change(name: str) -> None:
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


def test_bias_correction_of_the_last_layer_starts_after_the_freeze() -> None:
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
    np.testing.assert_allclose(change + decay, expected, rtol=1e-5)  # because of eps


def test_a_freeze_does_not_change_the_moments() -> None:
    tx = optim.hold_while_frozen(optim.adamw())
    params, grads = jnp.ones((2, 3)), jnp.full((2, 3), 0.1)
    now = {"learning_rate": 0.1, "weight_decay": 0.1}
    _, before = tx.update(grads, tx.init(params), params, frozen=False, **now)
    updates, after = tx.update(100 * grads, before, params, frozen=True, **now)
    assert not updates.any()
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_fixed_norms_do_not_change_and_have_no_state(name: str) -> None:
    history = run(name, norm_last_layer=True)
    np.testing.assert_array_equal(
        history[-1][0]["head/last_layer/g"], history[0][0]["head/last_layer/g"]
    )
    assert (1, 8) not in {x.shape for x in jax.tree.leaves(history[-1][1])}
    free = expected_params(name)  # all other parameters are the same as without fixed norms
    free["head/last_layer/g"] = history[0][0]["head/last_layer/g"]
    assert_equal_params(history[-1][0], free)
