"""Checks whether a run may resume with the current settings."""

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dino_jax.config.build import flatten, model_spec
from dino_jax.config.file import default_config
from dino_jax.errors import UsageError
from dino_jax.models import default_settings
from dino_jax.models.network import abstract

# Keys that do not change what a run computes, such as paths.
CHANGEABLE = re.compile(
    r"(checkpoint|log|eval)\..*|data\.(train|num_threads|max_(unreadable|pixels))|train\.sharding|model\.(attention|remat)"
)


def check_same_run(
    previous: dict[str, Any], config: ConfigDict, *, num_images: int, workdir: Path
) -> None:
    """Rejects settings that would change the results of a resumed run.

    For a converted checkpoint, only the settings that it contains are compared.

    Args:
      previous: facts stored in the run's checkpoint: `config`, `num_images`, and `converted` for a
        converted checkpoint.
      config: the current config.
      num_images: the current number of images in `data.train`.
      workdir: the run's folder, for the message.
    Raises:
      UsageError: settings differ. The message lists every key with both values.
    """
    before = _with_defaults(previous["config"]) | {"images in data.train": previous["num_images"]}
    after = _with_defaults(config) | {"images in data.train": num_images}
    compared = before.keys() | after.keys()
    if converted := previous.get("converted"):
        if converted["epoch"] is None:
            raise UsageError(
                f"{workdir} contains a converted backbone without a training state: start a run in "
                f"another workdir with --config.init_from={workdir}"
            )
        compared = {key for key, value in before.items() if value is not None}
        # A converted checkpoint stores model.dtype=float32, which is only meant for evaluation.
        compared = compared - {"model.dtype"} | {"init_from"}
    else:  # an older version wrote fewer keys, whose defaults keep its behaviour
        before = flatten(default_config()) | before
    if before.get("init_from") is not None:
        compared -= {"init_from"}  # not read when a run resumes, so its spelling may change
    differing = [
        f"{key}: {before.get(key)!r} before, {after.get(key)!r} now"
        for key in sorted(compared)
        if before.get(key) != after.get(key) and not _may_change(key, config)
    ]
    if differing:
        more_epochs = "train.epochs" in compared and before["train.epochs"] < after["train.epochs"]
        longer = f"; to train longer, add --config.init_from={workdir} there" if more_epochs else ""
        raise UsageError(
            f"{workdir} contains a run with other settings ({'; '.join(differing)}): "
            f"use the same settings to resume it, or another workdir for a new run{longer}"
        )


def advice(previous: dict[str, Any], config: ConfigDict) -> list[str]:
    """Notes on allowed changes that the user should double-check, one sentence each.

    Args:
      previous: facts stored in the run's checkpoint, as in `check_same_run`.
      config: the current config.
    """
    before, notes = flatten(previous["config"]), []
    if before.get("data.train") not in (None, config.data.train):
        notes.append(
            f"data.train changed from {before['data.train']} to {config.data.train}: it must "
            "contain the same images in the same order, but only their number was checked"
        )
    if before.get("init_from") not in (None, config.init_from):
        notes.append(
            f"init_from changed from {before['init_from']} to {config.init_from}: it is not read, "
            "because the run resumes from its own checkpoint"
        )
    return notes


def _may_change(key: str, config: ConfigDict) -> bool:
    """Whether a key may change between the runs."""
    if key == "optim.accumulation_steps":  # changes only rounding, unless there is BatchNorm
        return not abstract(model_spec(config).model)[2]
    return CHANGEABLE.fullmatch(key) is not None


def _with_defaults(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """A flat config in which unset sizes are replaced by the architecture's defaults."""
    flat = flatten(config)
    defaults = default_settings(flat["model.name"])
    return flat | {
        key: defaults.get(key.rpartition(".")[2])
        for key, value in flat.items()
        if value is None and key.startswith(("model.patch_size", "model.overrides."))
    }
