"""A run's plan: initial weights, shapes and shardings."""

import jax
import numpy as np
import pytest

from dino_jax import sharding
from dino_jax.config.build import model_spec
from dino_jax.config.file import override, read_config
from dino_jax.run.out_of_memory import Need
from dino_jax.run.plan import Plan, make_plan
from dino_jax.training.views import make_views
from tests.support import runs


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_weights_share_no_key_with_crops(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(init=jax.random.key_data, shapes=None, shardings=None, step=None)
    drawn = plan.first_state(seed)
    taken = []  # the keys into which an image's index is folded
    fold_in = jax.random.fold_in
    monkeypatch.setattr(
        jax.random, "fold_in", lambda key, x: taken.append(fold_in(key, x)) or taken[-1]
    )
    monkeypatch.setattr("dino_jax.training.views.augment", lambda *_: ())
    batch = {"canvas": None, "size": None, "index": np.arange(1)}
    for epoch in range(5):
        taken.clear()
        make_views(batch, np.int32(epoch), seed=seed, crops=None)
        assert (jax.random.key_data(taken[0]) != drawn).any()


def test_vit_large_state_is_sharded() -> None:
    """Checked on shapes only, because the state would take 9 GiB on one device."""
    config = read_config(runs.CONFIG.replace(":debug", ""))
    override(config, ["--config.model.name=vit_large", "--config.train.sharding=fsdp"])
    mesh = sharding.make_mesh()
    plan = make_plan(config, model_spec(config), mesh, steps_per_epoch=5)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.shapes))
    need = Need.of(plan.shapes, plan.shardings, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(plan.shapes.params["backbone"]))
    assert round(parameters / 1e6, 2) == 303.30
    assert whole / 8 < need.state < 1.01 * whole / 8
