"""Starting runs from weights, and the random states that they replace."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.config.build import model_spec
from dino_jax.run.plan import Plan, make_plan
from dino_jax.training.state import TrainState
from dino_jax.weights.initial import Start, read_initial, start_from
from tests.conftest import GOLDENS
from tests.support import runs

PTH = GOLDENS / "pth"
BACKBONE = str(PTH / "backbone.pth")
ONE_NETWORK = "it contains one network, which becomes both student and teacher"
MADE = "the center is computed from the teacher's logits for the first batch"


def fixture_config(init_from: str, **changes: object) -> ConfigDict:
    """The config of a run with the network of the fixtures."""
    return runs.tiny_config(
        **{
            "model__overrides__image_size": 32,
            "model__overrides__embed_dim": 48,
            "model__overrides__num_heads": 3,
            "head__out_dim": 96,
            "head__num_layers": 3,
            "init_from": init_from,
        }
        | changes
    )


@cache
def random_start(config: str, devices: int) -> tuple[Plan, TrainState]:
    """The plan and initial state of a config without weights, compiled once for all tests."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    parsed = ConfigDict(json.loads(config))
    plan = make_plan(parsed, model_spec(parsed), mesh, steps_per_epoch=5)
    return plan, plan.first_state(0)


def start(config: ConfigDict, devices: int = 1) -> tuple[Start, TrainState, Plan]:
    """The start, the random state that it replaces, and the plan."""
    without = config.to_dict() | {"init_from": None}
    plan, state = random_start(json.dumps(without), devices)
    return start_from(read_initial(config, model_spec(config), plan.shapes), state), state, plan


def batch_of(config: ConfigDict) -> dict[str, jax.Array]:
    """A batch of noise for this config's step."""
    rng = np.random.default_rng(0)
    count, side = config.train.batch_size, config.data.canvas_size
    return {
        "canvas": jnp.asarray(rng.integers(0, 256, (count, side, side, 3)), jnp.uint8),
        "size": jnp.full((count, 2), side, jnp.int32),
        "index": jnp.arange(count, dtype=jnp.int32),
    }
