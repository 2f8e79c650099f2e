"""Folders that are given as weights but are not the folder of a run."""

import os
from pathlib import Path

import pytest

from dino_jax.errors import UsageError
from dino_jax.weights.locate import folder_and_step


@pytest.mark.parametrize(
    ("paths", "given", "message"),
    [
        (["run/checkpoints/10"], "run/checkpoints/10", "a single checkpoint .*: give .*/run@10$"),
        (["run/checkpoints/10"], "run/checkpoints/10/teacher", "give .*/run@10$"),
        (["run/checkpoints/10"], "run/checkpoints", "give the run's folder, .*/run$"),
        (
            ["run/checkpoints/best"],
            "run/checkpoints/best",
            "renamed or moved: put it back to RUN/c",
        ),
        (["best"], "best", "renamed or moved: put it back to RUN/checkpoints/STEP"),
        (["best"], "best/teacher", "renamed or moved"),
        (["run/saved/10"], "run/saved", "in a renamed folder: rename it to RUN/checkpoints"),
    ],
)
def test_parts_of_a_run(paths: list[str], given: str, message: str, tmp_path: Path) -> None:
    for path in paths:
        for item in ("about", "teacher"):
            (tmp_path / path / item).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"is .*{message}"):
        folder_and_step(str(tmp_path / given))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "model.safetensors"], "a folder of Hugging Face or timm, which is not"),
        (["config.json", "pytorch_model.bin"], "a folder of Hugging Face or timm, which is not"),
        (["model.safetensors"], "a folder of safetensors files, which is not"),
        ([".metadata", "__0_0.distcp"], "a distributed checkpoint of torch, which is not"),
        (["_CHECKPOINT_METADATA", "default"], "an Orbax checkpoint of another program, which"),
        (["_METADATA", "manifest.ocdbt"], "an Orbax checkpoint of another program, or a part"),
        (["data.pkl", "version"], "an unpacked file of torch.save, which is not"),
        (["saved_model.pb"], "a TensorFlow model, which is not"),
        (["b.pth", "a.pth"], r"give one of its files, such as .*/a\.pth$"),
    ],
)
def test_folders_of_other_programs(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        folder_and_step(str(tmp_path))


def test_run_and_empty_folders_are_left_alone(tmp_path: Path) -> None:
    assert folder_and_step(str(tmp_path)) == (tmp_path, None)
    (tmp_path / "checkpoints/10/teacher").mkdir(parents=True)
    (tmp_path / "config.json").touch()
    assert folder_and_step(f"{tmp_path}@10") == (tmp_path, 10)


def test_rejects_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UsageError, match=r"pipe\.pth' is a pipe or a device: give a file or"):
        folder_and_step(str(tmp_path / "pipe.pth"))
