"""A run that was killed, stopped or moved to other devices resumes with equal results."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.config.file import default_config
from dino_jax.errors import UsageError
from dino_jax.run.log import RunLog
from dino_jax.run.resume import advice, check_same_run
from tests.support import runs
from tests.support.debug_config import config_with

WORKDIR = Path("runs/here")


def seen(workdir: Path, pattern: str) -> Callable[[], bool]:
    """Whether the checkpoints folder contains an entry that matches."""
    return lambda: any((workdir / "checkpoints").glob(pattern))


def logged(workdir: Path, step: int) -> Callable[[], bool]:
    """Whether the metrics of a step have been written."""
    log = workdir / "metrics.jsonl"
    return lambda: log.exists() and f'{{"step": {step},' in log.read_text()


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    command = runs.arguments(checkpoint__every_steps=2)
    moments = [
        seen(workdir, "2.*tmp*"),  # the first checkpoint is being written
        seen(workdir, "5.*tmp*"),  # the checkpoint at the end of an epoch is being written
        logged(workdir, 8),
    ]
    with runs.started(workdir, *command) as process:
        for number, moment in enumerate(moments):
            runs.wait_until(moment, process)
            # The files of a stopped process are the same as those of a killed process.
            process.send_signal(signal.SIGSTOP)
            shutil.copytree(workdir, tmp_path / f"killed_{number}")
            process.send_signal(signal.SIGCONT)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    # The same command resumes the run, and saves when interrupted. JAX's settings are reset.
    before = runs.steps(workdir)[-1]
    settings = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    settings |= {"JAX_DISABLE_JIT": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    with runs.started(workdir, *command, **settings) as process:
        runs.wait_until(lambda: runs.steps(workdir)[-1] > before, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    stopped = runs.steps(workdir)[-1]
    assert before < stopped < runs.TOTAL_STEPS
    assert "JAX_ENABLE_X64=True is ignored: dino_jax needs False" in output
    assert "devices: 1 x cpu" in output
    assert f"SIGINT: saved after step {stopped} of {runs.TOTAL_STEPS}" in output
    assert "run the same command to resume" in output

    for folder in [workdir, *tmp_path.glob("killed_*")]:
        runs.train_here(runs.tiny_config(), folder)
        runs.assert_equal(folder, runs.whole())
        assert not list((folder / "checkpoints").glob("*tmp*"))


def test_stopped_in_the_last_step(tmp_path: Path) -> None:
    """The run is finished and has logged its last epoch; it needs no further command."""
    assert runs.train_here(runs.tiny_config(), tmp_path, stop_after=runs.TOTAL_STEPS)["finished"]
    runs.assert_equal(tmp_path, runs.whole())


def test_stopped_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    end = runs.STEPS_PER_EPOCH
    result = runs.train_here(runs.tiny_config(), tmp_path, stop_after=end)
    assert (result["step"], result["finished"]) == (end, False)
    # Settings for reading data and for keeping checkpoints may change.
    changed = runs.tiny_config(data__num_threads=5, checkpoint__keep_every_epochs=1)
    result = runs.train_here(changed, tmp_path)
    assert (result["step"], result["finished"]) == (runs.TOTAL_STEPS, True)
    assert runs.steps(tmp_path) == [5, 10, 12, 15]  # the two latest, and each epoch's
    runs.assert_equal(tmp_path, runs.whole())


def test_killed_between_saving_and_logging_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "epoch", Mock(side_effect=runs.KilledError))
        with pytest.raises(runs.KilledError):
            runs.train_here(runs.tiny_config(), tmp_path)
    assert runs.steps(tmp_path)[-1] == runs.STEPS_PER_EPOCH
    assert runs.train_here(runs.tiny_config(), tmp_path)["finished"]
    runs.assert_equal(tmp_path, runs.whole())


def test_killed_between_saving_and_logging_the_last_epoch(tmp_path: Path) -> None:
    shutil.copytree(runs.whole(), tmp_path, dirs_exist_ok=True)
    log = tmp_path / "log.txt"
    *lines, _ = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines))
    assert runs.train_here(runs.tiny_config(), tmp_path)["finished"]
    runs.assert_equal(tmp_path, runs.whole())


def test_finished_run_only_redraws_pictures(tmp_path: Path) -> None:
    shutil.copytree(runs.whole(), tmp_path, dirs_exist_ok=True)
    pictures = [tmp_path / "learning_curve.png", tmp_path / "attention.png"]
    pictures[0].unlink(missing_ok=True)
    assert runs.train_here(runs.tiny_config(log__attention_sheet=1), tmp_path)["finished"]
    runs.assert_equal(tmp_path, runs.whole())
    assert all(path.exists() for path in pictures)


def test_another_number_of_devices_and_sharding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 256)  # otherwise nothing would be sharded
    config = runs.tiny_config()
    config.train.sharding = "fsdp"
    runs.train_here(config, tmp_path, devices=8, stop_after=7)
    config.train.sharding = "dp"
    assert runs.train_here(config, tmp_path, devices=1)["finished"]

    for name in ("log.txt", "metrics.jsonl"):
        ours, theirs = runs.records(tmp_path, name), runs.records(runs.whole(), name)
        assert [r.keys() for r in ours] == [r.keys() for r in theirs]
        for key in ("loss", "train_loss", "teacher_entropy"):
            values = [[r[key] for r in records if key in r] for records in (ours, theirs)]
            np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)


def test_newest_checkpoint_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs.train_here(runs.tiny_config(), tmp_path, stop_after=7)
    assert runs.steps(tmp_path) == [5, 7]
    data = (tmp_path / "checkpoints" / "7").rglob("teacher/**/d/*")
    largest = max(data, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    runs.train_here(runs.tiny_config(), tmp_path)
    warnings = [r.getMessage() for r in caplog.records if "step 7" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].endswith("trying the previous one")
    runs.assert_equal(tmp_path, runs.whole())


# Which settings may change when a run resumes


def stored(config: ConfigDict, num_images: int = 256) -> dict[str, Any]:
    """The facts that a checkpoint stores about its run, as read back from disk."""
    return json.loads(
        json.dumps({"config": json.loads(config.to_json()), "num_images": num_images})
    )


def test_accepts_equal_settings() -> None:
    config = config_with()
    check_same_run(stored(config), config, num_images=256, workdir=WORKDIR)


def test_rejects_other_settings_by_name() -> None:
    now = config_with(optim__lr=0.1, crops__global_scale=(0.3, 1.0), model__overrides__depth=3)
    with pytest.raises(UsageError) as error:
        check_same_run(stored(config_with()), now, num_images=300, workdir=WORKDIR)
    message = str(error.value)
    for part in (
        "runs/here contains a run with other settings",
        "crops.global_scale: [0.4, 1.0] before, [0.3, 1.0] now",
        "images in data.train: 256 before, 300 now",
        "model.overrides.depth: 2 before, 3 now",
        "optim.lr: 0.0005 before, 0.1 now",
        "use the same settings to resume it, or another workdir for a new run",
    ):
        assert part in message
    assert message.count(" before, ") == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint__every_steps": 7, "log__every_steps": 1, "eval__knn_ks": (5,)},
        {"eval__knn_test": None, "eval__crop": 16},
        {"data__train": "folder:/moved", "data__num_threads": 1, "data__max_unreadable": 0.5},
        {"train__sharding": "fsdp", "model__remat": "full"},
        {"optim__accumulation_steps": 2},
    ],
    ids=str,
)
def test_accepts_settings_that_do_not_affect_results(changes: dict[str, Any]) -> None:
    now = config_with(**changes)
    check_same_run(stored(config_with()), now, num_images=256, workdir=WORKDIR)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"train__batch_size": 64},
        {"train__epochs": 3},
        {"model__dtype": "bfloat16"},
        {"data__canvas_size": 32},
    ],
    ids=str,
)
def test_rejects_settings_that_affect_results(changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(UsageError, match=key.replace("__", r"\.")):
        check_same_run(
            stored(config_with()), config_with(**changes), num_images=256, workdir=WORKDIR
        )


@pytest.mark.parametrize("now", ["elsewhere/a.pth", "./a.pth", None])
def test_init_from_is_not_compared(now: str | None) -> None:
    """A run that resumes does not read it, so its file may have moved or been deleted."""
    before, after = stored(config_with(init_from="a.pth")), config_with(init_from=now)
    check_same_run(before, after, num_images=256, workdir=WORKDIR)
    assert advice(before, after) == [
        f"init_from changed from a.pth to {now}: it is not read, because the run resumes from its "
        "own checkpoint"
    ]


def test_init_from_cannot_be_added() -> None:
    now = config_with(init_from="a.pth")
    with pytest.raises(UsageError, match=r"init_from: None before, 'a.pth' now"):
        check_same_run(stored(config_with()), now, num_images=256, workdir=WORKDIR)


def test_more_epochs_need_a_new_run() -> None:
    now = config_with(train__epochs=3)
    with pytest.raises(UsageError) as error:
        check_same_run(stored(config_with()), now, num_images=256, workdir=WORKDIR)
    assert str(error.value).endswith(
        "(train.epochs: 2 before, 3 now): use the same settings to resume it, or another workdir "
        "for a new run; to train longer, add --config.init_from=runs/here there"
    )


def test_fewer_epochs_need_no_weights() -> None:
    now = config_with(train__epochs=1)
    with pytest.raises(UsageError, match=r"or another workdir for a new run$"):
        check_same_run(stored(config_with()), now, num_images=256, workdir=WORKDIR)


@pytest.mark.parametrize("key", ["optim.clip_grad", "data.canvas_size", "model.remat"])
def test_runs_of_older_versions_lack_keys(key: str) -> None:
    section, name = key.split(".")
    default = default_config()[section][name]
    now = config_with(**{f"{section}__{name}": default})
    before = stored(now)
    del before["config"][section][name]
    check_same_run(before, now, num_images=256, workdir=WORKDIR)
    if key != "model.remat":
        now[section][name] = type(default)(7)
        with pytest.raises(UsageError, match=rf"{key}: {default} before, 7"):
            check_same_run(before, now, num_images=256, workdir=WORKDIR)


def test_advice_on_another_source() -> None:
    before, moved = stored(config_with()), config_with(data__train="folder:/moved")
    assert advice(before, config_with()) == []
    (sentence,) = advice(before, moved)
    assert sentence.startswith("data.train changed from shapes:256@train to folder:/moved: ")
    assert advice(converted(), moved) == []  # a converted checkpoint does not name its data


def test_rejects_other_accumulation_with_batch_norm() -> None:
    before, after = (
        config_with(head__use_bn=True, optim__accumulation_steps=steps) for steps in (1, 2)
    )
    with pytest.raises(UsageError, match=r"\(optim\.accumulation_steps: 1 before, 2 now\)"):
        check_same_run(stored(before), after, num_images=256, workdir=WORKDIR)


def test_unset_sizes_equal_the_defaults() -> None:
    unset = config_with(model__patch_size=None, model__overrides__num_heads=None)
    named = config_with(model__patch_size=16, model__overrides__num_heads=6)  # as vit_small has
    for before, after in ((unset, named), (named, unset)):
        check_same_run(stored(before), after, num_images=256, workdir=WORKDIR)
    other = config_with(model__patch_size=None, model__overrides__num_heads=3)
    with pytest.raises(UsageError, match=r"\(model\.overrides\.num_heads: 6 before, 3 now\)"):
        check_same_run(stored(unset), other, num_images=256, workdir=WORKDIR)


def converted(epoch: int | None = 3, **known: Any) -> dict[str, Any]:
    """The facts stored in a converted checkpoint, with some settings only."""
    config = config_with(model__dtype="float32", model__drop_path_rate=None, **known).to_dict()
    about = {"config": {name: config[name] for name in ("model", "head", "seed")}}
    return about | {"num_images": None, "converted": {"epoch": epoch}}


def test_compares_only_known_settings_of_a_converted_checkpoint() -> None:
    now = config_with(optim__lr=0.1, model__drop_path_rate=0.2, train__batch_size=64)
    check_same_run(converted(), now, num_images=256, workdir=WORKDIR)
    for changes, message in (
        ({"head__out_dim": 8}, "head.out_dim: 256 before, 8 now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"model__patch_size": None}, "model.patch_size: 8 before, 16 now"),
        ({"init_from": "x.pth"}, "init_from: None before, 'x.pth' now"),
    ):
        with pytest.raises(UsageError, match=message):
            check_same_run(converted(), config_with(**changes), num_images=256, workdir=WORKDIR)
    with pytest.raises(UsageError, match=r"contains a converted backbone .* --config.init_from="):
        check_same_run(converted(None), now, num_images=256, workdir=WORKDIR)
