"""Converts a `.pth` file of the original DINO to an Orbax checkpoint."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tyro.conf import Positional

from dino_jax.checkpoints import lock
from dino_jax.config.build import spec_settings
from dino_jax.errors import UsageError, about, listed
from dino_jax.paths import local_paths
from dino_jax.weights.folders import explain
from dino_jax.weights.hub import sha256_of
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.load import from_torch, without_head
from dino_jax.weights.locate import find_file, full_or_backbone
from dino_jax.weights.state.training_state import is_plain, whole_state

PyTree = Any

STEP = 0  # a run that resumes a converted checkpoint counts its steps from the epoch


@local_paths
def convert(
    file: Positional[str],
    out: Positional[Path],
    backbone_only: bool = False,
    force: bool = False,
    num_heads: int | None = None,
) -> None:
    """Converts a .pth file of the original DINO to an Orbax checkpoint.

    A full checkpoint becomes a complete training state (student, teacher, heads, center, epoch,
    optimizer), which `main.py --workdir OUT` resumes. A backbone can only be evaluated.

    Args:
      file: The .pth file, or a hub name. A hub name selects its full checkpoint, if released.
      out: The folder to write.
      backbone_only: Convert the teacher's backbone only.
      force: Overwrite the checkpoints in OUT.
      num_heads: Attention heads of a ViT; only needed for unusual widths, because the file does
        not contain it.

    Raises:
      UsageError: the file cannot be converted, OUT is not empty, or another process uses OUT.
    """
    _check_free(out, force)
    path = find_file(file, "backbone" if backbone_only else full_or_backbone(file))
    if path is None:
        what = explain(Path(file)) or "neither a file nor a hub name: give a .pth file"
        raise UsageError(f"file={file!r} is {what}")
    items, facts, ignored = _converted(file, path, backbone_only, num_heads)
    _write(out, items, facts, force)
    print(_summary(file, out, items, facts, ignored))


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={out} is a file: give a new folder")
    if out.exists() and not force and any(path.name != lock.NAME for path in out.iterdir()):
        raise UsageError(f"out={out} is not empty: give a new folder, or overwrite with --force")


def _converted(
    file: str, path: Path, backbone_only: bool, num_heads: int | None
) -> tuple[dict[str, PyTree], dict[str, Any], tuple[str, ...]]:
    """The items of the checkpoint, facts about it, and the names that were left out.

    The file's own tensors are freed on return.
    """
    from dino_jax.checkpoints.checkpoint import to_items  # here, because Orbax is slow to import

    found = read_torch_checkpoint(path)
    if found.kind == "linear":
        raise UsageError(f"{file} is a linear classifier: load it with `dino_jax.load_linear`")
    whole = found.kind == "full" and not backbone_only
    with about(file):
        if whole:
            config, state = whole_state(found, num_heads=num_heads)
            items = to_items(state)
        else:
            network = from_torch(found.network("teacher"), num_heads=num_heads)
            spec, arrays = without_head(*network)
            config = spec_settings(spec)
            items = {"teacher": jax.tree.map(jnp.array, arrays)}
    facts = {
        "config": json.loads(config.to_json()),
        "num_images": None,
        "converted": {
            "source": file,
            "sha256": sha256_of(path),
            "epoch": found.epoch if whole else None,
            "args": {str(k): v if is_plain(v) else str(v) for k, v in found.args.items()},
        },
    }
    return items, facts, found.ignored


def _write(out: Path, items: dict[str, PyTree], facts: dict[str, Any], force: bool) -> None:
    """Writes the checkpoint while holding the folder's lock. On failure the folder is unchanged."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock.take(out):
            _check_free(out, force)  # again, because another process may have written to it
            try:
                _fill(out, items, facts, force)
            except BaseException:
                if new:
                    (out / lock.NAME).unlink()
                raise
    except OSError as error:
        raise UsageError(
            f"out={out} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    finally:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()  # only succeeds if the folder is empty


def _fill(out: Path, items: dict[str, PyTree], facts: dict[str, Any], force: bool) -> None:
    """Writes a new folder before replacing the old one, so that a failure loses nothing."""
    from dino_jax.checkpoints.checkpoint import RunCheckpoints
    from dino_jax.checkpoints.read import FOLDER

    with tempfile.TemporaryDirectory(prefix=".converting", dir=out) as folder:
        part = Path(folder)
        with RunCheckpoints(part, about=facts, keep_every_steps=0) as checkpoints:
            checkpoints.save_items(STEP, items)
        if force and (out / FOLDER).exists():
            (out / FOLDER).rename(part / "replaced")
        (part / FOLDER).rename(out / FOLDER)


def _summary(
    file: str,
    out: Path,
    items: dict[str, PyTree],
    facts: dict[str, Any],
    ignored: tuple[str, ...],
) -> str:
    """What was converted, and how to use it, in a few lines."""
    count = sum(x.size for x in jax.tree.leaves(items["teacher"]["params"]))
    name, epoch = facts["config"]["model"]["name"], facts["converted"]["epoch"]
    lines = [f"{file}: {name}, {count / 1e6:.1f} M parameters, written to {out}"]
    if ignored:
        lines.append(f"ignored: {listed(ignored, limit=10)}")
    if "training" in items:
        lines.append(
            f"full training state after {epoch} epochs: resume it with main.py --config FILE "
            f"--workdir {out}"
        )
    return "\n".join(lines)
