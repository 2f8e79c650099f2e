"""`python main.py`: errors, interruptions and exit codes."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import dino_jax
from dino_jax import cli, sharding, train
from dino_jax.checkpoints import lock
from dino_jax.config.build import model_spec
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.models.network import split
from dino_jax.run import sheet as run_sheet
from dino_jax.run.loop import TrainingDiverged
from dino_jax.run.plan import Plan
from tests.support import runs

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command line in this process and returns (exit code, stderr)."""

    def run(*settings: str, workdir: Path = tmp_path / "run") -> tuple[int, str]:
        arguments = ["--config", runs.CONFIG, "--workdir", str(workdir)]
        try:
            cli.main(["train", *arguments, *runs.arguments(), *settings])
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, capfd.readouterr().err

    return run


@pytest.fixture(scope="module")
def whole() -> Path:
    return runs.whole()


@pytest.fixture
def rejected(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The error message of a command that must be rejected before anything compiles."""

    def fail(*_: Any) -> None:
        pytest.fail("compilation started")

    monkeypatch.setattr(train, "compile_step", fail)
    monkeypatch.setattr(Plan, "first_state", fail)

    def run(*settings: str, **workdir: Path) -> str:
        code, stderr = command(*settings, **workdir)
        assert code == 2
        last = stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert "Traceback" not in stderr
        return last

    return run


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 16), (i, 100, 255 - i)).save(folder / f"{i:03}.png")
    return folder


def junk(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"junk{i}.jpg").write_text("<html>404</html>")
    return folder


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "optim.learning_rate=1",
            "'optim.learning_rate': the keys of this section are .*optim.lr,",
        ),
        ("modle.name=vit_tiny", r"unknown setting 'modle.name': did you mean model.name\?"),
        ("train.epochs=abc", "train.epochs=abc must be a whole number, such as 3"),
        ("data.train=none", "data.train is not set: add --config.data.train=folder:/path"),
        ("data.train=/not/there", "'folder:/not/there': /not/there is not a folder; check"),
        ("data.train=floder:x", "'floder:x': unknown kind 'floder'; choose one of folder, idx, "),
        ("data.train=shapes:90@tset", "no split 'tset'; choose one of train, val, test"),
        (
            "data.train=shapes:9",
            "shapes:9.* has 9 images, fewer than one batch .*batch_size=16: use",
        ),
        ("model.name=vit_giant", "unknown model 'vit_giant': choose one of vit_tiny, vit_small, "),
        ("train.batch_size=12", "batch_size=12 is not divisible by 8 devices .* multiple of 8"),
        ("crops.global_size=20", "global_size=20 is not a multiple of model.patch_size=8: .*ch"),
        ("eval.knn_every_epochs=1 eval.resize=8", "eval.crop=16 must be .* most eval.resize=8"),
        ("eval.knn_every_epochs=1 eval.knn_test=none", "eval.knn_test is not set: set it to a lab"),
        ("optim.name=adam", "optim.name='adam' is unknown: choose one of adamw, sgd, lars"),
        ("optim.lr=nan", "optim.lr=nan must be finite and not negative"),
        ("head.out_dim=99999999999", "not enough device memory: .* GiB for the state, .* GiB ava"),
    ],
)
def test_rejects_settings(setting: str, message: str, rejected: Callable[..., str]) -> None:
    stderr = rejected(*[f"--config.{key}" for key in setting.split()])
    assert re.search(message, stderr)


def test_rejects_data(rejected: Callable[..., str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images in" in rejected(f"--config.data.train={empty}")
    unlabelled = pictures(tmp_path / "unlabelled", 20)
    stderr = rejected(
        f"--config.data.train={unlabelled}",
        "--config.eval.knn_every_epochs=1",
        f"--config.eval.knn_test={unlabelled}",
    )
    assert "unlabelled has no labels, which classification needs: " in stderr
    stderr = rejected(f"--config.data.train={junk(tmp_path / 'junk', 20)}")
    assert re.search(
        r"1\d of the 20 images in .*junk cannot be read, .* or raise max_unreadable", stderr
    )


def test_rejects_workdirs(
    whole: Path, rejected: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/file", file / "below"):
        stderr, workdir = rejected(workdir=name), Path(name).expanduser()
        assert re.search(f"workdir={workdir} cannot be written .*: choose another folder", stderr)

    other = shutil.copytree(whole, tmp_path / "other")
    settings = ["--config.optim.lr=0.1", "--config.data.train=shapes:86@train"]
    stderr = rejected(*settings, workdir=other)
    assert "contains a run with other settings" in stderr
    assert "optim.lr: 0.02 before, 0.1 now" in stderr
    assert "images in data.train: 85 before, 86 now" in stderr
    assert "train.batch_size" not in stderr
    assert runs.steps(other) == runs.steps(whole)

    with lock.take(other):
        stderr = rejected(workdir=other)
    assert re.search(f"workdir={other} is in use by process .*: wait until it ends, stop", stderr)


def test_rejects_a_workdir_among_images(rejected: Callable[..., str], tmp_path: Path) -> None:
    train_folder, test_folder = (pictures(tmp_path / name / "class", 20) for name in ("a", "b"))
    settings = [
        f"--config.data.train={train_folder.parent}",
        "--config.eval.knn_every_epochs=1",
        f"--config.eval.knn_train={train_folder.parent}",
        f"--config.eval.knn_test={test_folder.parent}",
    ]
    for workdir in (train_folder, train_folder.parent, test_folder):
        before = sorted(workdir.iterdir())
        assert f"workdir={workdir} contains images of " in rejected(*settings, workdir=workdir)
        assert sorted(workdir.iterdir()) == before


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    with runs.started(tmp_path, "--config.modle.name=x") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert output.startswith("error: unknown setting 'modle.name'")
    without = subprocess.run(
        [sys.executable, "main.py", "--config", runs.CONFIG],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
    )
    assert without.returncode == 2
    assert "the following arguments are required: --workdir" in without.stderr


def test_ctrl_c_during_startup_ends_immediately(tmp_path: Path) -> None:
    with runs.started(tmp_path, *runs.arguments()) as process:
        libraries = Path(f"/proc/{process.pid}/maps")
        # While JAX is being imported.
        runs.wait_until(lambda: "jaxlib" in libraries.read_text(), process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert not output


def test_full_disk_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: ocp.CheckpointManager) -> None:
        finish(self)
        if 10 in self.all_steps():
            raise ValueError("RESOURCE_EXHAUSTED: writing: No space left on device")

    finish = ocp.CheckpointManager.wait_until_finished
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
    message = r"a checkpoint cannot be written to .*No space left on device.*\bsame command"
    with pytest.raises(UsageError, match=message):
        runs.train_here(runs.tiny_config(), tmp_path)
    assert runs.steps(tmp_path)[-1] == 10


def test_unreadable_images_are_replaced_up_to_a_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, broken = pictures(tmp_path / "images" / "a", 82), junk(tmp_path / "images" / "b", 3)
    workdir = tmp_path / "run"
    config = runs.tiny_config(
        data__train=images.parent,
        eval__knn_train=None,
        eval__knn_test=images.parent,
        eval__knn_every_epochs=1,
    )
    assert runs.train_here(config, workdir, stop_after=10)["step"] == 10
    warnings = [r.getMessage() for r in caplog.records if "unreadable image" in r.getMessage()]
    assert sorted(warning.split()[2] for warning in warnings) == [
        f"{broken}/junk{i}.jpg:" for i in range(3)
    ]
    for path in sorted(images.glob("*.png"))[-20:]:
        path.write_text("gone")
    with pytest.raises(UsageError, match=r"1\d of the 85 .* max_unreadable=0.05 allows 10; the"):
        runs.train_here(config, workdir)
    kept = runs.steps(workdir)
    assert kept[-1] >= 10
    assert runs.arrays(workdir)["training['step']"] == kept[-1]


def test_run_draws_its_attention_sheet_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_sheet, "SIZE", (32, 32))
    config = runs.tiny_config(log__attention_sheet=2)
    runs.train_here(config, tmp_path, stop_after=6)
    assert not (tmp_path / "attention.png").exists()
    runs.train_here(config, tmp_path)
    file = tmp_path / "attention.png"
    drawn = file.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    mesh = sharding.make_mesh(jax.devices()[:1])
    sheet = run_sheet.RunSheet(config, model_spec(config), open_source(config.data.train), mesh)
    for which, is_drawn in (("student", False), ("teacher", True)):
        _, params, stats = split(dino_jax.load(tmp_path, which=which)[0])
        sheet({"backbone": params}, {"backbone": stats}, file)
        assert (file.read_bytes() == drawn) == is_drawn


def test_diverging_run_exits_with_code_1(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise TrainingDiverged("loss or gradients were not finite")

    monkeypatch.setattr(train, "run", run)
    code, stderr = command()
    assert (code, stderr.strip()) == (1, "stopped: loss or gradients were not finite")
