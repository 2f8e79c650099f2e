"""Explains folders that are given as weights but are not the folder of a run."""

import os
from pathlib import Path

_CHECKPOINTS = "checkpoints"  # of a run; see `checkpoints.checkpoint`, which is slow to import
_ITEMS = ("about", "teacher")  # of every checkpoint of ours


def explain(folder: Path) -> str | None:
    """What a folder without checkpoints contains, and the way out; None if it is unknown."""
    if os.path.isdir(folder / _CHECKPOINTS):
        return None
    inside, names = folder.absolute(), _names(folder)
    for step in (inside, inside.parent):
        if _is_checkpoint(step):
            if step.parent.name == _CHECKPOINTS and step.name.isdecimal():
                run = f"{step.parent.parent}@{step.name}"
                return f"a single checkpoint of a run: give {run}"
            return (
                "a checkpoint that was renamed or moved: put it back to RUN/checkpoints/STEP, "
                "where STEP is a number, and give RUN@STEP"
            )
    if any(_is_checkpoint(folder / name) for name in names):
        if inside.name == _CHECKPOINTS:
            return f"the checkpoints of a run: give the run's folder, {inside.parent}"
        return "a run's checkpoints in a renamed folder: rename it to RUN/checkpoints, and give RUN"
    for project, endings in _OTHERS.items():
        if all(any(name.endswith(ending) for name in names) for ending in endings):
            return f"{project}, which is not supported: {_WAY_OUT}"
    if files := sorted(name for name in names if name.endswith((".pth", ".pt", ".ckpt"))):
        return f"a folder of weights: give one of its files, such as {folder / files[0]}"
    return None


_WAY_OUT = "give a run's folder, a folder written by `convert`, or a .pth file"
_OTHERS = {  # by the endings of names that occur together
    "a folder of Hugging Face or timm": ("config.json",),
    "a folder of safetensors files": (".safetensors",),
    "a distributed checkpoint of torch": (".distcp",),
    "an unpacked file of torch.save": ("data.pkl",),
    "a TensorFlow model": ("saved_model.pb",),
    "a checkpoint of TensorFlow": (".data-00000-of-00001",),
    "an Orbax checkpoint of another program": ("_CHECKPOINT_METADATA",),
    "an Orbax checkpoint of another program, or a part of one": ("_METADATA",),
    "the arrays of an Orbax checkpoint": ("manifest.ocdbt",),
}


def _is_checkpoint(folder: Path) -> bool:
    return all(os.path.isdir(folder / item) for item in _ITEMS)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
