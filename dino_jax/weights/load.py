"""From the name of some weights to a model that holds them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from dino_jax import checkpoint, settings
from dino_jax.errors import UsageError
from dino_jax.models.network import abstract

WHICH = ("teacher", "student")


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """What a model that was loaded is, and where it is from."""

    arch: str  # a key of `models.MODELS`
    patch_size: int  # pixels
    embed_dim: int  # width of the features
    source: str  # as given to `load`, with the step
    sha256: str  # of the backbone's arrays; the same weights have the same
    which: str  # "teacher" or "student"
    dtype: str  # that it computes in
    resize: int  # pixels: how its images are prepared, as `evaluate.features.EvalTransform`
    crop: int
    mean: tuple[float, ...]  # of each channel in 0..1, subtracted from its input
    std: tuple[float, ...]


def load(
    weights: str | Path, *, which: str = "teacher", head: bool = False
) -> tuple[nnx.Module, WeightsInfo] | tuple[nnx.Module, nnx.Module, WeightsInfo]:
    """Loads a model with its weights, ready for evaluation.

    Args:
      weights: a run folder (its workdir), for the latest checkpoint, or `WORKDIR@STEP`.
      which: "teacher", whose features are the better ones, or "student".
      head: return the projection head too.
    Returns: (backbone, info), or (backbone, head, info).
    Raises:
      UsageError: nothing there can be loaded, or the step does not exist.

    Example:
      model, info = dino_jax.load("runs/s16")
      features = model(images)  # [B, H, W, C] normalised -> [B, D]
    """
    if which not in WHICH:
        raise UsageError(f"which={which!r} is unknown: choose one of {', '.join(WHICH)}")
    folder, step = _folder_and_step(str(weights))
    manager = checkpoint.open_for_reading(folder)
    steps = sorted(manager.all_steps())
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(
            f"{folder} has no checkpoint of step {step}: choose one of {', '.join(map(str, steps))}"
        )
    try:
        config = ConfigDict(checkpoint.read_about(manager, step)["config"])
        graphdef, params, batch_stats = abstract(lambda rngs: settings.build_model(config, rngs))
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            {"params": params, "batch_stats": batch_stats},
        )
        arrays = checkpoint.read_model(manager, step, which, shapes)
    except checkpoint.DamagedCheckpoint as error:
        others = ", ".join(f"{folder}@{s}" for s in steps if s != step) or "none"
        raise UsageError(f"{folder}: {error}; other checkpoints to try: {others}") from error
    finally:
        manager.close()
    model = nnx.merge(graphdef, arrays["params"], arrays["batch_stats"])
    model.eval()
    info = WeightsInfo(
        arch=config.model.name,
        patch_size=config.model.patch_size,
        embed_dim=model.backbone.embed_dim,
        source=f"{folder}@{step}",
        sha256=tree_hash(arrays["params"]["backbone"]),
        which=which,
        dtype=jnp.dtype(settings.compute_dtype(config.model.dtype)).name,
        resize=config.eval.resize,
        crop=config.eval.crop,
        mean=tuple(config.crops.mean),
        std=tuple(config.crops.std),
    )
    return (model.backbone, model.head, info) if head else (model.backbone, info)


def tree_hash(tree: Any) -> str:
    """SHA-256 over the names, shapes and bytes of a tree's arrays."""
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        name = jax.tree_util.keystr(path)
        digest.update(json.dumps([name, array.shape, str(array.dtype)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _folder_and_step(weights: str) -> tuple[Path, int | None]:
    """Splits WORKDIR@STEP; a folder whose own name holds an @ is itself."""
    folder, at, step = weights.rpartition("@")
    if not at or Path(weights).exists():
        folder, step = weights, ""
    if step and not step.isdigit():
        raise UsageError(f"{weights!r}: the step behind @ must be a whole number")
    if not Path(folder).is_dir():
        raise UsageError(
            f"{folder!r} is not a folder: give the folder of a run (its workdir), or WORKDIR@STEP"
        )
    return Path(folder), int(step) if step else None
