"""Jobs on a run's folder, and their command lines."""

import errno
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dino_jax import cli
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.extractor import Extraction
from dino_jax.jobs.knn import knn
from tests.support import runs
from tests.support.class_folders import class_folders

BLOCKS = re.findall(r"```bash\n(.*?)```", (runs.ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"python -m dino_jax (.+)", "".join(BLOCKS).replace("\\\n", ""))
SOURCES = {"train": "shapes:85@train", "test": "shapes:30@test"}


def test_knn_equals_the_score_logged_by_the_run(tmp_path: Path) -> None:
    """Same weights, transform and images, and eight devices as in the run."""
    output, report = tmp_path / "results.json", tmp_path / "report.png"
    settings = {"ks": (10, 20), "output": output, "report": report}
    table = knn(str(runs.scored()), **SOURCES, **settings)
    last = json.loads((runs.scored() / "log.txt").read_text().splitlines()[-1])
    for k in (10, 20):
        assert table[k]["top1"] == pytest.approx(last[f"knn_{k}_top1"])
        assert table[k]["top5"] == pytest.approx(last[f"knn_{k}_top5"])
    result = json.loads(output.read_text())
    assert result["metrics"]["knn"]["20"]["top1"] == pytest.approx(table[20]["top1"])
    assert result["settings"]["crop"] == 16
    assert result["settings"]["canvas_size"] == 64
    assert report.read_bytes().startswith(b"\x89PNG")
    assert result["settings"]["temperature"] == 0.07
    assert result["weights"]["dtype"] == "float32"
    assert len(result["weights"]["sha256"]) == 64
    assert {"jax", "dino_jax", "python", "device"} <= result["versions"].keys()


def test_knn_of_the_student_with_more_neighbours_than_images(tmp_path: Path) -> None:
    student, output = Extraction(which="student"), tmp_path / "r.json"
    table = knn(str(runs.scored()), **SOURCES, options=student, ks=(500,), output=output)
    assert list(table) == [85]


def test_classes_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The queries lack class a, so b and c have different numbers there; a warning is logged."""
    bank = class_folders(tmp_path / "bank", "abc")
    queries = class_folders(tmp_path / "queries", "bc")
    table = knn(str(runs.scored()), bank, queries, ks=(1,), output=tmp_path / "r.json")
    assert table[1]["top1"] == 100.0
    assert "has no images of 1 of the 3 classes" in caplog.text
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics["classes_without_test_images"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "/nowhere"}, "'/nowhere' is neither a hub name .*workdir"),
        ({"ks": (0,)}, "ks=.*at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan must be above 0"),
        ({"memory_budget": 0}, "memory_budget=0 must be at least 1"),
        ({"options": Extraction(crop=64, resize=32)}, "crop=64 must not be larger than resize=32"),
        ({"report": Path("neighbours")}, "report=neighbours cannot be written as a picture"),
        ({"test": "shapes:30@nope"}, "no split 'nope'"),
    ],
)
def test_rejects_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = (
        {"weights": str(runs.scored())} | SOURCES | {"output": tmp_path / "r.json"} | changes
    )
    with pytest.raises(UsageError, match=message):
        knn(**arguments)


def test_rejects_unlabelled_sources_and_unknown_classes(tmp_path: Path) -> None:
    bank = class_folders(tmp_path / "bank", "ab")
    queries = class_folders(tmp_path / "queries", "bcd")
    with pytest.raises(UsageError, match=r"has classes that .*bank lacks \(c, d\)"):
        knn(str(runs.scored()), bank, queries, output=tmp_path / "r.json")
    with pytest.raises(UsageError, match=r"has no labels"):
        knn(str(runs.scored()), bank, f"{queries}/b", output=tmp_path / "r.json")
    for name, array in (("images-idx3", np.zeros((6, 8, 8))), ("labels-idx1", np.arange(6) % 2)):
        shape = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        (tmp_path / f"train-{name}-ubyte").write_bytes(shape + array.astype(np.uint8).tobytes())
    for sources in ((f"idx:{tmp_path}@train", queries), (queries, f"idx:{tmp_path}@train")):
        with pytest.raises(UsageError, match=r"has class names and the other has numbers"):
            knn("/nowhere", *sources, output=tmp_path / "r.json")


def test_usage_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "knn --weights /nowhere --train shapes:20 --test shapes:20"
    monkeypatch.setattr(sys, "argv", ["dino-jax", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: '/nowhere' is neither a hub name (dino_")


def test_out_of_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exhausted = "RESOURCE_EXHAUSTED: Out of memory allocating 52 bytes.\nBufferAssignment"

    def pack(source: str) -> None:
        raise jax.errors.JaxRuntimeError(exhausted if source == "large" else "INTERNAL: a bug")

    monkeypatch.setattr(cli.Job, "load", lambda *_: pack)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pack", "--source", "large"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Out of memory allocating 52 bytes.): process fewer or smaller images" in line
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        cli.main(["pack", "--source", "small"])


def test_operating_system_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "features.npy")

    def pack() -> None:
        raise error

    monkeypatch.setattr(cli.Job, "load", lambda *_: pack)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pack"])
    assert stop.value.code == 2
    expected = "error: [Errno 28] No space left on device: 'features.npy'\n"
    assert capsys.readouterr().err == expected
    error = OSError("a bug")
    with pytest.raises(OSError, match="a bug"):
        cli.main(["pack"])


def test_closed_output_pipe(goldens: Path) -> None:
    command = [sys.executable, "-m", "dino_jax", "inspect", str(goldens / "pth/linear.pth")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=runs.ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_convert_and_inspect_from_the_command_line(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(goldens / "pth/full_checkpoint.pth"), tmp_path / "out"
    cli.main(["convert", file, str(out), "--backbone-only"])
    assert f"written to {out}" in capsys.readouterr().out
    cli.main(["inspect", str(out), "--tensors"])
    assert "teacher.params.backbone.cls_token" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["convert", file, str(out)])
    assert capsys.readouterr().err == (
        f"error: out={out} is not empty: give a new folder, or overwrite with --force\n"
    )
    cli.main(["convert", file, str(out), "--force", "--num-heads", "6"])
    assert "full training state after 100 epochs" in capsys.readouterr().out


def test_conversion_script(goldens: Path, tmp_path: Path) -> None:
    script = str(runs.ROOT / "convert_torch_weights.py")
    command = [sys.executable, script, str(goldens / "pth/evil.pth"), "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.match(r"error: .*evil\.pth: .*system", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["retrieval", "copy-detection", "video-segmentation"])
def test_data_set_jobs_reject_wrong_data(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extraction options are plain flags. The error is one line and precedes loading weights."""
    options = "--image-size 64 --batch-size 4 --num-threads 2 --dtype bfloat16"
    words = [job, "--weights", "none", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main(words + options.split())
    assert stop.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert str(tmp_path) in shown[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_are_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses each command and calls a stand-in with the job's signature."""
    calls = []

    def recorded(name: str, job: Callable) -> Callable:
        @functools.wraps(job)
        def record(**settings: Any) -> None:
            calls.append((name, settings))

        return record

    load = cli.Job.load
    monkeypatch.setattr(cli.Job, "load", lambda job, name: recorded(name, load(job, name)))
    job, *words = shlex.split(command, comments=True)
    cli.main([job, *words])
    ((called, settings),) = calls
    assert called == job
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    settings |= vars(settings["cache"]) if "cache" in settings else {}
    assert all(settings[option] is not None for option in given)


def test_readme_shows_every_job() -> None:
    shown = {command.split()[0] for command in COMMANDS}
    assert shown | {"convert", "inspect"} == set(cli.JOBS)


def test_help_lists_the_jobs() -> None:
    command = [sys.executable, "-m", "dino_jax", "--help"]
    shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    for job in cli.JOBS:
        assert job in shown.stdout
