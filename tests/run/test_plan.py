"""What a run draws its initial weights from."""

import jax
import numpy as np
import pytest

from dino_jax.run.plan import Plan
from dino_jax.training.views import make_views


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_weights_share_no_key_with_crops(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(init=jax.random.key_data, shapes=None, shardings=None, step=None)
    drawn = plan.first_state(seed)
    taken = []  # to fold an image's index in
    fold_in = jax.random.fold_in
    monkeypatch.setattr(
        jax.random, "fold_in", lambda key, x: taken.append(fold_in(key, x)) or taken[-1]
    )
    monkeypatch.setattr("dino_jax.run.plan.augment", lambda *_: ())
    batch = {"canvas": None, "size": None, "index": np.arange(1)}
    for epoch in range(5):
        taken.clear()
        make_views(batch, np.int32(epoch), seed=seed, crops=None)
        assert (jax.random.key_data(taken[0]) != drawn).any()
