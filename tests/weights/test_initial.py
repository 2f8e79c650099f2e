"""Starting a run from every kind of weights."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import dino_jax
from dino_jax import sharding
from dino_jax.checkpoints import checkpoint, read
from dino_jax.config.build import model_spec
from dino_jax.errors import UsageError
from dino_jax.jobs.convert import convert
from dino_jax.models.network import split
from dino_jax.run.plan import make_plan
from dino_jax.training.state import TrainState
from dino_jax.weights.formats.pth.file import read_torch_file
from dino_jax.weights.initial import read_initial
from dino_jax.weights.layouts.mapping import to_torch
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.state.training_state import whole_state
from tests.support import runs
from tests.support.starts import BACKBONE, MADE, ONE_NETWORK, PTH, batch_of, fixture_config, start
from tests.support.torch_files import save

FULL = str(PTH / "full_checkpoint.pth")
RESTORED = "the optimizer state is restored"


def rejected(config: ConfigDict) -> None:
    """Reads weights for a run, with abstract arrays only; enough for tests of rejections."""
    spec = model_spec(config)
    plan = make_plan(config, spec, sharding.make_mesh(jax.devices()[:1]), steps_per_epoch=5)
    read_initial(config, spec, plan.shapes)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_may_be_trained(state: TrainState) -> None:
    """Asserts that no array occurs twice, because a step donates them all."""
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(state)
        for shard in x.addressable_shards
    ]
    assert len(pointers) == len(set(pointers))


# .pth files


def test_full_checkpoint() -> None:
    (state, has_center, notes), random, _ = start(fixture_config(FULL))
    _, expected = whole_state(read_torch_checkpoint(FULL))
    for part in ("params", "teacher_params", "center", "opt_state"):
        assert_same(getattr(state, part), getattr(expected, part))
    assert_same(state.meters, random.meters)
    assert int(state.step) == 0
    assert has_center
    assert notes == [f"starting from {FULL}", RESTORED]
    assert_may_be_trained(state)


def test_converted_folder_gives_the_same_start(tmp_path: Path) -> None:
    convert(FULL, tmp_path)
    from_folder, _, _ = start(fixture_config(str(tmp_path)))
    from_file, _, _ = start(fixture_config(FULL))
    assert_same(from_folder.state, from_file.state)
    assert from_folder.notes == [f"starting from {tmp_path}", RESTORED]
    assert from_folder.has_center
    assert_may_be_trained(from_folder.state)


@pytest.mark.parametrize("converted", [False, True])
def test_backbone(converted: bool, tmp_path: Path) -> None:
    weights = BACKBONE
    if converted:
        weights = str(tmp_path)
        convert(BACKBONE, tmp_path)
    (state, has_center, notes), random, _ = start(fixture_config(weights))
    model, _ = dino_jax.load(BACKBONE)
    backbone = split(model)[1]
    for params, before in (
        (state.params, random.params),
        (state.teacher_params, random.teacher_params),
    ):
        assert_same(params["backbone"], backbone)
        assert_same(params["head"], before["head"])
    assert_same(state.opt_state, random.opt_state)
    assert not has_center
    none = "it has no head: head, center and optimizer state are newly initialized"
    assert notes == [f"starting from {weights}", ONE_NETWORK, none, MADE]
    assert_may_be_trained(state)


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "dino_deitsmall16_pretrain"
    place.mkdir()
    shutil.copy(FULL, place / "dino_deitsmall16_pretrain_full_checkpoint.pth")
    monkeypatch.setenv("DINO_JAX_HUB", str(tmp_path))
    found, _, _ = start(fixture_config("dino_vits16"))
    assert found.notes == ["starting from dino_vits16", RESTORED]


def test_different_number_of_prototypes() -> None:
    config = fixture_config(FULL, head__out_dim=64)
    (state, has_center, notes), random, _ = start(config)
    stored = read_torch_checkpoint(FULL)
    for which, params in (("student", state.params), ("teacher", state.teacher_params)):
        tensors = to_torch(params["backbone"], {}, "vit")
        expected = stored.network(which).backbone
        assert all(np.array_equal(tensors[name], x) for name, x in expected.items())
        assert_same(params["head"], random.params["head"])
    assert_same(state.opt_state, random.opt_state)
    assert not has_center
    sizes = "it has a head of different sizes: head, center and optimizer state are newly init"
    assert notes == [f"starting from {FULL}", f"{sizes}ialized", MADE]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"optim__name": "sgd"},
            "the optimizer state lacks momentum_buffer, in the right shape, for 37",
        ),
        ({"head__norm_last_layer": False}, "the stored one has a different head.norm_last_layer"),
    ],
)
@pytest.mark.parametrize("converted", [False, True])
def test_different_optimizer_is_newly_initialized(
    changes: dict[str, Any], why: str, converted: bool, tmp_path: Path
) -> None:
    if converted:
        convert(FULL, tmp_path)
        why = "the stored one has a different optim.name or head.norm_last_layer"
    config = fixture_config(str(tmp_path) if converted else FULL, **changes)
    (state, has_center, notes), random, _ = start(config)
    assert_same(state.opt_state, random.opt_state)
    np.testing.assert_array_equal(state.center, read_torch_checkpoint(FULL).center)
    assert has_center
    assert re.match(f"the optimizer state is newly initialized: {re.escape(why)}", notes[-1])


def test_file_without_optimizer_and_center(tmp_path: Path) -> None:
    found = read_torch_file(FULL)
    del found["optimizer"], found["dino_loss"], found["student"]
    path = str(save(tmp_path / "teacher.pth", found))
    (state, has_center, notes), _, _ = start(fixture_config(path))
    assert not has_center
    assert notes[1:] == [
        ONE_NETWORK,
        MADE,
        "the optimizer state is newly initialized: the weights do not contain one",
    ]
    assert_same(state.params, state.teacher_params)
    assert_may_be_trained(state)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        (FULL, {"model__overrides__depth": 1}, r"blocks\.1\.\S+ is unexpected; .*inspect"),
        (FULL, {"model__patch_size": 16}, r"patch_embed\.kernel is \[192, 48\], not \[768, 48\]"),
        (str(PTH / "linear.pth"), {}, "it is a linear classifier: give a backbone or a full"),
        (str(PTH / "nothing.pth"), {}, "is neither a hub name"),
    ],
)
def test_rejects(weights: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"init_from={re.escape(weights)}: .*{message}"):
        rejected(fixture_config(weights, **changes))


# Run folders


def test_run_folder_and_its_steps() -> None:
    workdir = runs.whole()
    (state, has_center, notes), _, plan = start(runs.tiny_config(init_from=workdir))
    mesh = sharding.make_mesh(jax.devices()[:1])
    shapes = sharding.with_shardings(plan.shapes, sharding.state_shardings(plan.shapes, mesh, "dp"))
    with read.open_for_reading(workdir) as manager:
        items = read.read_items(manager, runs.TOTAL_STEPS, checkpoint.to_items(shapes))
    former = checkpoint.from_items(items)
    for part in ("params", "teacher_params", "center", "opt_state"):
        assert_same(getattr(state, part), getattr(former, part))
    assert int(state.step) == 0
    assert has_center
    assert notes == [f"starting from {workdir}", RESTORED]
    assert_may_be_trained(state)
    first = runs.steps(workdir)[0]
    earlier, _, _ = start(runs.tiny_config(init_from=f"{workdir}@{first}"))
    assert not np.array_equal(earlier.state.center, state.center)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__overrides__num_heads": 4}, r"\(num_heads is 2, not 4\)"),
        (
            {"model__overrides__embed_dim": 32},
            r"\(blocks\.0\.\S+ is \[16\], not \[32\]; ",
        ),
    ],
)
def test_rejects_a_run_with_a_different_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rejected(runs.tiny_config(init_from=runs.whole(), **changes))


def test_arrays_get_the_shardings_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1000)
    config = fixture_config(FULL, train__sharding="fsdp")
    (state, *_), random, plan = start(config, devices=8)
    assert jax.tree.map(lambda x: x.sharding, state) == plan.shardings
    assert not state.params["head"]["layers"][0]["kernel"].sharding.is_fully_replicated
    alone, _, _ = start(fixture_config(FULL))
    assert_same(jax.device_get(state), jax.device_get(alone.state))
    center = plan.compute_center(random, batch_of(config))
    assert center.sharding == plan.shardings.center
