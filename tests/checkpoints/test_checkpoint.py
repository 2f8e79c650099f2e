"""Keeping, restoring and recovering checkpoints."""

import gc
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from dino_jax import sharding
from dino_jax.checkpoints import checkpoint, read
from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.checkpoints.damage import DamagedCheckpoint
from dino_jax.checkpoints.read import checksums
from dino_jax.errors import UsageError
from dino_jax.training.state import TrainState, start_state

ABOUT = {"config": {"optim": {"lr": 0.1, "scale": [0.4, 1.0]}}, "num_images": 7}


def state_at(step: int) -> TrainState:
    params = {
        "backbone": {"kernel": jnp.arange(6400.0).reshape(100, 64) + step},
        "head": {"bias": jnp.full(5, float(step), jnp.bfloat16)},
    }
    stats = {"backbone": {"mean": jnp.full(3, -float(step))}}
    state = start_state(params, stats, optax.adam(1e-3), num_prototypes=4)
    return state.replace(
        step=jnp.asarray(step, jnp.int32),
        teacher_params=jax.tree.map(lambda x: x + 1, params),
        center=jnp.full((1, 4), jnp.nan),  # NaN must also be restored bit for bit
    )


def abstract(where: jax.sharding.Sharding | None = None) -> TrainState:
    where = where or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state_at(0),
    )


def open_run(workdir: Path, keep_every_steps: int = 0) -> RunCheckpoints:
    return RunCheckpoints(workdir, about=ABOUT, keep_every_steps=keep_every_steps)


def assert_same(state: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("saved")
    with open_run(workdir) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step))
    return workdir


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of a run that has checkpoints of steps 2 and 3."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def steps(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def largest_file(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def test_restores_bit_for_bit(run: Path) -> None:
    with open_run(run) as checkpoints:
        assert_same(checkpoints.restore_latest(abstract()), state_at(3))
        about = checkpoints.latest_about()
    assert {name: about[name] for name in ABOUT} == ABOUT


def test_new_run_has_nothing_to_restore(tmp_path: Path) -> None:
    with open_run(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.latest_about() is None
        assert checkpoints.restore_latest(abstract()) is None


def test_restores_with_the_given_shardings(run: Path) -> None:
    where = sharding.state_shardings(state_at(0), sharding.make_mesh(), "fsdp")
    assert not where.params["backbone"]["kernel"].is_fully_replicated
    with open_run(run) as checkpoints:
        state = checkpoints.restore_latest(sharding.with_shardings(abstract(), where))
    assert jax.tree.map(lambda x: x.sharding, state) == where
    assert_same(state, state_at(3))


def test_keeps_the_last_two_and_every_nth(tmp_path: Path) -> None:
    with open_run(tmp_path, keep_every_steps=3) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, state_at(step))
    assert steps(tmp_path) == ["3", "6", "7", "8"]


def test_saves_a_step_once(run: Path) -> None:
    with open_run(run) as checkpoints:
        checkpoints.save(3, state_at(4))
        assert_same(checkpoints.restore_latest(abstract()), state_at(3))


def test_reads_a_single_network(run: Path) -> None:
    model = {"teacher": checkpoint.to_items(abstract())["teacher"]}
    with read.open_for_reading(run) as manager:
        teacher = read.read_items(manager, 2, model)["teacher"]
    expected = state_at(2)
    np.testing.assert_array_equal(
        teacher["params"]["backbone"]["kernel"], expected.teacher_params["backbone"]["kernel"]
    )


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("kernel", (100, 64), jnp.bfloat16, r"kernel is float32 .*, expected bfloat16 \[100, 64\]"),
        ("kernel", (100, 32), jnp.float32, r"is float32 \[100, 64\], expected float32 \[100, 32\]"),
        ("weight", (100, 64), jnp.float32, r"weight is missing, .*kernel .*, expected nothing;"),
    ],
)
def test_other_names_shapes_and_dtypes_are_not_damage(
    name: str, shape: tuple[int, ...], dtype: Any, message: str, run: Path
) -> None:
    params = {"backbone": {name: jax.ShapeDtypeStruct(shape, dtype)}}
    state = abstract().replace(params=abstract().params | params)
    with open_run(run) as checkpoints, pytest.raises(UsageError, match=f"step 3 in .*{message}"):
        checkpoints.restore_latest(state)
    assert steps(run) == ["2", "3"]


def damages() -> Iterator[Any]:
    """Yields pairs of a name and a function that damages a step's folder."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    for item in read.ARRAY_ITEMS:
        yield f"bit in {item}", lambda folder, item=item: flip(largest_file(folder / item / "d"))
    for item in read.ARRAY_ITEMS:
        yield f"no {item}", lambda folder, item=item: shutil.rmtree(folder / item)
    yield "bit in about", lambda folder: flip(folder / "about" / "metadata")
    yield "no about", lambda folder: shutil.rmtree(folder / "about")
    yield "truncated", lambda folder: largest_file(folder / "student").write_bytes(b"\0\1\2")
    yield "data missing", lambda folder: largest_file(folder / "student").unlink()
    yield "empty", lambda folder: (shutil.rmtree(folder), folder.mkdir())


DAMAGES = dict(damages())


# Orbax leaves an unfinished coroutine if reading fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_to_the_previous_checkpoint(
    damage: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](run / "checkpoints" / "3")
    with open_run(run) as checkpoints:
        assert checkpoints.latest_about()["num_images"] == 7
        with caplog.at_level(logging.WARNING, "root"):
            state = checkpoints.restore_latest(abstract())
        assert_same(state, state_at(2))
        messages = [r.getMessage() for r in caplog.records if r.name == "root"]
        assert len(messages) == 1
        assert re.fullmatch(r"the checkpoint of step 3 .*; trying the previous one", messages[0])
        # The damaged checkpoint was deleted, so that this step can be saved again.
        checkpoints.save(3, state_at(3))
    with open_run(run) as checkpoints:
        assert_same(checkpoints.restore_latest(abstract()), state_at(3))
    gc.collect()


def test_all_damaged(run: Path) -> None:
    for step in ("2", "3"):
        shutil.rmtree(run / "checkpoints" / step / "student")
    message = r"none of the checkpoints.*step 3.*step 2.*backup"
    with open_run(run) as checkpoints, pytest.raises(UsageError, match=message):
        checkpoints.restore_latest(abstract())
    assert steps(run) == ["2", "3"]  # nothing is deleted


def test_ignores_unfinished_folders(run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    with open_run(run) as checkpoints:
        assert int(checkpoints.restore_latest(abstract()).step) == 3
        checkpoints.save(4, state_at(4))  # replaces it
    with open_run(run) as checkpoints:
        assert int(checkpoints.restore_latest(abstract()).step) == 4


def test_folder_in_use_is_not_changed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with open_run(run), monkeypatch.context() as patch:
            # It would delete the folder of a step that the other process is writing.
            patch.delattr(ocp, "CheckpointManager")
            with pytest.raises(UsageError, match=f"workdir={run} is in use by process"):
                open_run(run)


def test_out_of_memory_is_not_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(run) as checkpoints:

        def fail(*_: object, **__: object) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore_latest(abstract())
    assert steps(run) == ["2", "3"]


@pytest.mark.parametrize(
    ("error", "damaged"),
    [
        (ValueError("ABORTED: Error reading: Stale file handle"), False),
        (ValueError("UNKNOWN: Too many levels of symbolic links"), False),
        (ValueError("FAILED_PRECONDITION: Error reading [os_error_code='107']"), False),
        (PermissionError(13, "Permission denied"), False),
        (ValueError("DATA_LOSS: Error reading: checksum differs"), True),
        (FileNotFoundError(2, "No such file"), True),
        (KeyError("checksum"), True),
    ],
)
def test_only_damaged_checkpoints_are_deleted(
    error: Exception, damaged: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(run) as checkpoints:
        restore = checkpoints._manager.restore

        def fail(step: int, **args: Any) -> Any:
            if step == 3:
                raise error
            return restore(step, **args)

        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        if damaged:
            assert_same(checkpoints.restore_latest(abstract()), state_at(2))
        else:
            with pytest.raises(UsageError, match=r"step 3 cannot be read at the mo.*same command"):
                checkpoints.restore_latest(abstract())
    assert steps(run) == (["2"] if damaged else ["2", "3"])


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_unwritable_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"workdir=.*file.* cannot be written \(.*\): choose"):
        open_run(tmp_path / place)


def test_rejects_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no checkpoints: give the folder of a run"):
        read.open_for_reading(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="contains no finished checkpoint yet"):
        read.open_for_reading(tmp_path)


def test_checksums_detect_flips_and_swaps() -> None:
    tree = {"a": jnp.arange(5000.0), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.int32(7)}
    before = checksums(tree)
    bits = np.asarray(tree["a"]).view(np.uint32)
    for bit in range(32):
        flipped = bits.copy()
        flipped[4321] ^= np.uint32(1) << np.uint32(bit)
        assert checksums(tree | {"a": jnp.asarray(flipped.view(np.float32))}) != before
    swapped = np.asarray(tree["a"]).copy()
    swapped[[10, 20]] = swapped[[20, 10]]
    assert checksums(tree | {"a": jnp.asarray(swapped)}) != before
    assert checksums(tree | {"b": tree["b"].at[1].set(1.0078125)}) != before


def test_checksums_do_not_depend_on_devices() -> None:
    x = jnp.arange(4096.0).reshape(64, 64)
    spread = jax.device_put(x, sharding.batch_sharded(sharding.make_mesh()))
    assert len(spread.sharding.device_set) == 8
    assert checksums([spread]) == checksums([x])


UNUSUAL = ["a[1]", "*", "what?", "{a,b}", "s p", "$HOME", "new\nline", "~x", "caf\udce9", "gs:"]


@pytest.mark.parametrize("name", UNUSUAL, ids=ascii)
def test_every_path_can_be_written_and_read(name: str, tmp_path: Path) -> None:
    workdir = tmp_path / name / "run"
    with open_run(workdir) as checkpoints:
        checkpoints.save(1, state_at(1))
    assert steps(workdir) == ["1"]
    with open_run(workdir) as checkpoints:
        assert_same(checkpoints.restore_latest(abstract()), state_at(1))
    manager = read.open_for_reading(workdir)
    with pytest.raises(UsageError, match=re.escape(f"{workdir.resolve()} has no checkpoint of")):
        read.choose(manager, 7)
    manager.close()


def test_a_checkpoint_that_cannot_be_read_back_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one without the manifests that Orbax once did not write for some paths."""
    with open_run(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints._manager.wait_until_finished()
        shutil.rmtree(tmp_path / "checkpoints/1/student")
        with pytest.raises(UsageError, match=r"of step 1 .*cannot be read back \(student"):
            checkpoints.save(2, state_at(2))
    assert steps(tmp_path) == ["1"]

    def damaged(*_: object) -> None:
        raise DamagedCheckpoint("a reason")

    monkeypatch.setattr(checkpoint, "metadata", damaged)
    checkpoints = open_run(tmp_path / "other")
    with pytest.raises(UsageError, match=r"cannot be read back \(a reason\)"), checkpoints:
        checkpoints.save(1, state_at(1))  # the only one, so it is read on exit
