"""Whether a run may continue under these settings."""

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dino_jax.config.build import flatten, model_spec
from dino_jax.errors import UsageError
from dino_jax.models import default_settings
from dino_jax.models.network import abstract

# Keys that do not change what a run computes, or only where it reads and writes.
FREE_ON_RESUME = re.compile(
    r"(checkpoint|log|eval)\..*|data\.(train|num_threads|max_unreadable)|train\.sharding|model\.(attention|remat)"
)


def check_same_run(
    former: dict[str, Any], config: ConfigDict, *, num_images: int, workdir: Path
) -> None:
    """Refuses to continue a run under settings that would make it another one.

    A converted checkpoint does not know every setting: those that it knows must agree.

    Args:
      former: what the run's checkpoint says: `config` and `num_images`, or `converted`.
      config: the settings now.
      num_images: in `data.train` now.
      workdir: the run's folder, for the message.
    Raises:
      UsageError: names every key that differs, with both values.
    """
    before = _complete(former["config"]) | {"data.train has images": former["num_images"]}
    after = _complete(config) | {"data.train has images": num_images}
    compared = before.keys() | after.keys()
    if converted := former.get("converted"):
        if converted["epoch"] is None:
            raise UsageError(
                f"{workdir} holds a converted backbone, no training state: start a run in another "
                f"workdir with --config.init_from={workdir}"
            )
        compared = {key for key, value in before.items() if value is not None}
        compared = compared - {"model.dtype"} | {"init_from"}  # float32 is for its evaluation
    differing = [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(compared)
        if before.get(key) != after.get(key) and not _is_free(key, config)
    ]
    if differing:
        raise UsageError(
            f"{workdir} holds a run with other settings ({'; '.join(differing)}): "
            "use the same settings to resume it, or another workdir for a new run"
        )


def advice(former: dict[str, Any], config: ConfigDict) -> list[str]:
    """What may change but had better be checked, a sentence each.

    Args:
      former: as `check_same_run` takes it.
      config: the settings now.
    """
    before, now = flatten(former["config"]).get("data.train"), config.data.train
    if before in (None, now):
        return []
    return [
        f"data.train={now} was {before} before: the images must be the same in the same order, of "
        "which only their number has been compared"
    ]


def _is_free(key: str, config: ConfigDict) -> bool:
    """Whether a key may change: without BatchNorm the passes of a step are rounding alone."""
    if key == "optim.accumulation_steps":
        return not abstract(model_spec(config).model)[2]
    return FREE_ON_RESUME.fullmatch(key) is not None


def _complete(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """A config as `flatten` gives it, with the architecture's own sizes where none are set."""
    flat = flatten(config)
    own = default_settings(flat["model.name"])
    return flat | {
        key: own.get(key.rpartition(".")[2])
        for key, value in flat.items()
        if value is None and key.startswith(("model.patch_size", "model.overrides."))
    }
