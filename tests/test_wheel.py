"""The wheel: a complete package that trains from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import runs

TRAIN = [sys.executable, "-m", "dino_jax", "train"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel, as pip installs them."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=runs.ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def run(words: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": ""}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def test_contains_every_module_and_config(installed: Path) -> None:
    modules = {path.relative_to(runs.ROOT) for path in (runs.ROOT / "dino_jax").rglob("*.py")}
    configs = {Path("dino_jax/configs") / path.name for path in runs.ROOT.glob("configs/*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == modules | configs


def test_lists_the_configs(installed: Path, tmp_path: Path) -> None:
    done = run([*TRAIN, "--list"], installed, tmp_path)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(path.stem for path in runs.ROOT.glob("configs/*.py"))
    assert "vit_small        DINO ViT-S/16, 100 epochs" in done.stdout


def test_trains_a_config_that_builds_on_one_of_the_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dino_jax.configs import vit_small\n\n"
        "def get_config(arg=''):\n"
        "    config = vit_small.get_config('debug')\n"
        "    config.train.epochs, config.head.num_layers = 1, 1\n"
        "    config.eval.knn_every_epochs = config.crops.local_number = 0\n"
        "    return config\n"
    )
    words = ["--config=mine.py", "--workdir=run", "--config.data.train=shapes:64@train"]
    done = run([*TRAIN, *words], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finished: logs" in done.stderr
    assert (tmp_path / "run/log.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("words", [["-m", "dino_jax.train"], ["-m", "dino_jax", "train"]])
def test_every_entry_point_runs_the_command(
    words: list[str], installed: Path, tmp_path: Path
) -> None:
    done = run([sys.executable, *words, "--config=vit_smal", "--workdir=run"], installed, tmp_path)
    assert done.returncode == 2
    assert (
        "config=vit_smal is neither a Python file nor one of the package's configs" in done.stderr
    )
    assert not (tmp_path / "run").exists()
