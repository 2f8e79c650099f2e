"""The linear probe from weights of the reference to its files."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dino_jax.checkpoints import lock
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification import linear_training
from dino_jax.evaluate.features.tokens import ClassTokens
from dino_jax.jobs import linear as linear_job
from dino_jax.jobs.linear import linear
from tests.support.class_folders import class_folders
from tests.support.linear_setup import OPTIONS, RATES, TEST, TRAIN, interrupted_after


@pytest.fixture(scope="module")
def trained(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    linear(weights, TEST, workdir=workdir, learning_rates=RATES, **TRAIN)
    return workdir


def result(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def test_it_learns_and_says_how(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
    cosine = 0.5 + 0.5 * np.cos(np.pi * np.arange(4) / 4)
    for record, share in zip(log, cosine, strict=True):
        assert record["train_lr"] == pytest.approx([rate * share * 32 / 256 for rate in RATES])
    slow, quick = zip(*(record["train_loss"] for record in log), strict=True)
    assert abs(slow[0] - np.log(10)) < 0.3
    assert min(quick) < slow[-1] - 0.1
    metrics = result(trained)["metrics"]
    tops = np.array([record["test_top1"] for record in log])
    assert metrics["top1"] == tops.max()
    assert metrics["chosen_on"] == "test images"
    epoch, rate = np.unravel_index(tops.argmax(), tops.shape)
    assert (metrics["epoch"], metrics["learning_rate"]) == (epoch + 1, RATES[rate])
    assert metrics["top5"] == log[epoch]["test_top5"][rate]
    assert [row["learning_rate"] for row in metrics["learning_rates"]] == list(RATES)
    assert result(trained)["settings"]["feature"] == repr(ClassTokens(2))


def test_a_rate_alone_learns_the_same(weights: str, trained: Path, tmp_path: Path) -> None:
    linear(weights, TEST, workdir=tmp_path, learning_rates=RATES[1:], **TRAIN)
    beside, alone = (
        [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        for folder in (trained, tmp_path)
    )
    np.testing.assert_allclose(
        [record["train_loss"][1] for record in beside],
        [record["train_loss"][0] for record in alone],
        rtol=1e-4,
    )


def test_a_stopped_training_continues_to_the_same_bits(
    weights: str, trained: Path, tmp_path: Path
) -> None:
    arguments = {"workdir": tmp_path, "learning_rates": RATES} | TRAIN
    with interrupted_after(epochs=2):
        linear(weights, TEST, **arguments)
    with pytest.raises(UsageError, match=r"contains a training with epochs=4 \(now 9\): use ano"):
        linear(weights, TEST, **arguments | {"epochs": 9})
    linear(weights, TEST, **arguments)
    assert (tmp_path / "log.txt").read_bytes() == (trained / "log.txt").read_bytes()
    for name in ("head.npz", "progress.npz"):
        with np.load(tmp_path / name) as ours, np.load(trained / name) as theirs:
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key])
    with mock.patch.object(linear_training, "probe_step", side_effect=AssertionError("trained")):
        linear(weights, TEST, **arguments)  # nothing is left to do


def test_one_training_at_a_time_in_a_folder(weights: str, tmp_path: Path) -> None:
    with lock.take(tmp_path), pytest.raises(UsageError, match=r"is in use by process .*: wait"):
        linear(weights, TEST, workdir=tmp_path, **TRAIN)
    assert not (tmp_path / "log.txt").exists()
    with (
        mock.patch.object(linear_job, "_trained", side_effect=lambda *_: lock.take(tmp_path)),
        pytest.raises(UsageError, match="is in use by process"),
    ):
        linear(weights, TEST, workdir=tmp_path, **TRAIN)
    lock.take(tmp_path).close()


def test_classes_are_matched_by_name(weights: str, tmp_path: Path) -> None:
    """While it trains and when it is scored: the test images lack class a."""
    bank = class_folders(tmp_path / "bank", "abc", images=4)
    queries = class_folders(tmp_path / "queries", "bc", images=4)
    arguments = {"train": bank, "learning_rates": (1.0,), "epochs": 1, "train_batch_size": 8}
    # The same pictures, once with the bank's numbers and once with others.
    same, other = (
        linear(weights, test, workdir=tmp_path / name, options=OPTIONS, **arguments)
        for name, test in {"same": f"{bank}[4:]", "other": queries}.items()
    )
    assert other["top1"] == same["top1"]
    spelled = arguments | {"train": f"{bank}/", "workdir": tmp_path / "other", "options": OPTIONS}
    assert linear(weights, f"{queries}/", **spelled)["top1"] == other["top1"]  # goes on: the same
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("same", "other")]
    assert logs[0] == logs[1]
    results = (tmp_path / "other" / "results.json").read_text()
    arguments = {"evaluate": str(tmp_path / "other/head.npz"), "options": OPTIONS}
    for test in (f"{bank}[4:]", queries):
        scored = linear(weights, test, workdir=tmp_path / "other", **arguments)
        assert scored["loss"] == pytest.approx(json.loads(logs[0])["test_loss"][0])
        assert scored["classes_without_test_images"] == 1
    assert (tmp_path / "other" / "results.json").read_text() == results
    written = json.loads((tmp_path / "other" / "evaluate.json").read_text())
    assert written["metrics"]["top1"] == other["top1"]


def test_the_kept_head_scores_the_same(weights: str, trained: Path, tmp_path: Path) -> None:
    head = str(trained / "head.npz")
    found = linear(weights, TEST, evaluate=head, workdir=tmp_path, options=OPTIONS)
    expected = result(trained)["metrics"]
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])


def test_the_rate_may_be_chosen_on_held_out_images(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = TRAIN | {"epochs": 2, "hold_out": 0.25}
    with mock.patch.object(linear_job, "train_heads", wraps=linear_job.train_heads) as train_heads:
        found = linear(weights, TEST, workdir=tmp_path, learning_rates=RATES, **arguments)
    training = train_heads.call_args.args[3]
    order = np.random.default_rng(0).permutation(80)
    held = {f"shapes:80@train picture {i}" for i in order[:20]}
    kept = {training.name(i) for i in range(len(training))}
    assert len(kept) == 60
    assert not kept & held
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    held_out = np.array([record["held_out_top1"] for record in log])
    epoch, rate = np.unravel_index(held_out.argmax(), held_out.shape)
    assert found["chosen_on"] == "training images held out"
    assert found["top1"] == log[epoch]["test_top1"][rate]
    assert (held_out * 20 / 100 == np.round(held_out * 20 / 100)).all()  # of 20 images
    rows = found["learning_rates"]
    assert [row["best_held_out_top1"] for row in rows] == held_out.max(axis=0).tolist()
    shown = capsys.readouterr().out
    assert f"epoch {found['epoch']} of 2, chosen on the training images held out" in shown
    assert re.search(rf"best held out %\n.* {held_out[:, 0].max():.5g}\n", shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": None}, "either train=SOURCE .* or evaluate=HEAD"),
        ({"learning_rates": (0.1, 0.0)}, r"learning_rates=\(0.1, 0.0\) must be"),
        ({"learning_rates": (0.1, np.nan)}, r"learning_rates=\(0.1, nan\) must be"),
        ({"hold_out": 1.0}, "hold_out=1.0 must be at least 0 and below 1"),
        ({"epochs": 0}, "epochs=0 and train_batch_size=32 must be at least 1"),
        ({"train_batch_size": 96}, "train_batch_size=96 is larger than the 80 images"),
        ({"train_batch_size": 36}, "train_batch_size=36 is not divisible by the 8 devices"),
        ({"n_last_blocks": 9}, "n=9 must be between 1 and the depth, 2"),
        ({"evaluate": "/nowhere.npz", "train": None}, "/nowhere.npz: no such file"),
        ({"evaluate": "WEIGHTS", "train": None}, "is a backbone, not a linear classifier"),
    ],
)
def test_wrong_arguments(
    changes: dict[str, Any], message: str, weights: str, tmp_path: Path
) -> None:
    if changes.get("evaluate") == "WEIGHTS":
        changes = changes | {"evaluate": weights}
    with pytest.raises(UsageError, match=message):
        linear(weights, TEST, **{"workdir": tmp_path} | TRAIN | changes)


def test_replaced_images_are_counted_once(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a training that went on: the images of both parts together."""
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(path)
        if i in (4, 9, 13):
            path.write_text("no picture")
    arguments = {"train": str(tmp_path / "images"), "workdir": tmp_path, "learning_rates": RATES}
    arguments |= {"epochs": 3, "train_batch_size": 24, "options": OPTIONS}
    with interrupted_after(epochs=1):
        linear(weights, arguments["train"], **arguments)
    for _ in range(2):  # it goes on; then nothing is left to do
        metrics = linear(weights, arguments["train"], **arguments)
        assert metrics["replaced_training_images"] == 3
        shown = capsys.readouterr().out
        assert f"unreadable images of folder:{tmp_path}/images, replaced by the next" in shown
    assert result(tmp_path)["metrics"]["unreadable_images"] == {f"folder:{tmp_path}/images": 3}


def test_files_of_something_else_are_no_heads(weights: str, trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros((96, 10)))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "list.npz", about="[1]", kernel=np.zeros((96, 10)), bias=np.zeros(10))
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as file:  # which no parser understands
        file.writestr("about.npy", b"\x93NUMPY\x01\x00\x08\x00{'a': (1")
    others = [tmp_path / f"{name}.npz" for name in ("array", "list", "header")]
    for path in (trained / "progress.npz", *others):
        with pytest.raises(
            UsageError, match=rf"{path} is damaged or was not written by this job: give a head"
        ):
            linear(weights, TEST, evaluate=str(path), workdir=tmp_path, options=OPTIONS)


def test_damaged_files_are_named(weights: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "progress.npz").write_bytes((trained / "progress.npz").read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"progress.npz is damaged or was not written by this job"):
        linear(weights, TEST, workdir=tmp_path, learning_rates=RATES, **TRAIN)
