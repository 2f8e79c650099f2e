"""From a `.pth` file of the reference to an Orbax checkpoint of ours."""

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
from dino_jax.errors import UsageError, about
from dino_jax.weights.hub import sha256_of
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
from dino_jax.weights.load import from_torch, without_head
from dino_jax.weights.locate import find_file, full_if_released
from dino_jax.weights.state.training_state import is_plain, whole_state

PyTree = Any

STEP = 0  # of a converted checkpoint: a run that continues it counts from its epoch


def convert(
    file: Positional[str],
    out: Positional[Path],
    backbone_only: bool = False,
    force: bool = False,
    num_heads: int | None = None,
) -> None:
    """Converts a .pth file of the reference to an Orbax checkpoint.

    A whole checkpoint becomes a complete training state (student, teacher, heads, center, epoch,
    optimizer), which `main.py --workdir OUT` continues; a backbone becomes one to evaluate.

    Args:
      file: The .pth file, or a hub name for the whole checkpoint behind it.
      out: The folder to write.
      backbone_only: Keep the teacher's backbone and nothing else.
      force: Replace the checkpoints that OUT holds.
      num_heads: Attention heads of a ViT of unusual width, which a file does not tell.

    Raises:
      UsageError: the file cannot be converted, OUT is not empty, or another process is at work in
        it.
    """
    _check_free(out, force)
    path = find_file(file, "backbone" if backbone_only else full_if_released(file))
    if path is None:
        raise UsageError(f"file={file!r} is no file and no hub name: give a .pth file")
    items, facts, ignored = _converted(file, path, backbone_only, num_heads)
    _write(out, items, facts, force)
    print(_summary(file, out, items, facts, ignored))


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={out} is a file: give a folder that does not exist yet")
    if out.exists() and not force and any(path.name != lock.NAME for path in out.iterdir()):
        raise UsageError(f"out={out} is not empty: give a new folder, or --force to replace")


def _converted(
    file: str, path: Path, backbone_only: bool, num_heads: int | None
) -> tuple[dict[str, PyTree], dict[str, Any], tuple[str, ...]]:
    """Items of a checkpoint, what is said about it, and what of the file it leaves out.

    On return the file's own tensors are no longer in memory.
    """
    from dino_jax.checkpoints.checkpoint import to_items  # here: Orbax is slow to import

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
    """Fills a folder, which no other process uses meanwhile, or leaves what was there."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock.take(out):
            _check_free(out, force)  # again: another process may have been faster
            try:
                _fill(out, items, facts, force)
            except BaseException:
                if new:
                    (out / lock.NAME).unlink()
                raise
    except OSError as error:
        raise UsageError(f"out={out} cannot be written ({error.strerror or error})") from error
    finally:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()  # if it is still empty


def _fill(out: Path, items: dict[str, PyTree], facts: dict[str, Any], force: bool) -> None:
    """Writes a new folder beside the old one first, so that nothing is lost when that fails."""
    from dino_jax.checkpoints.checkpoint import FOLDER, RunCheckpoints

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
    """What was done, and how to go on, in a few lines."""
    count = sum(x.size for x in jax.tree.leaves(items["teacher"]["params"]))
    name, epoch = facts["config"]["model"]["name"], facts["converted"]["epoch"]
    lines = [f"{file}: {name}, {count / 1e6:.1f} M parameters, written to {out}"]
    if ignored:
        lines.append(f"of no use here and left out: {', '.join(ignored)}")
    if "training" in items:
        lines.append(
            f"a whole training state after {epoch} epochs, which main.py --config FILE "
            f"--workdir {out} continues"
        )
    return "\n".join(lines)
