"""Tiny runs in this process and in subprocesses, and their comparison."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from dino_jax import sharding, train
from dino_jax.checkpoints import lock, read
from dino_jax.config.file import override, read_config
from dino_jax.run import log
from dino_jax.run.interrupt import StopRequest
from dino_jax.training.step import StepSettings

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/default.py:debug"
STEPS_PER_EPOCH, TOTAL_STEPS = 5, 15
KEYS = {
    "model.overrides.image_size": 16,
    "model.overrides.embed_dim": 16,
    "model.overrides.num_heads": 2,
    "head.out_dim": 32,
    "head.num_layers": 1,
    "crops.global_size": 16,
    "crops.local_number": 0,
    "data.train": "shapes:85@train",
    "train.batch_size": 16,
    "train.epochs": TOTAL_STEPS // STEPS_PER_EPOCH,
    "optim.lr": 0.02,
    "optim.momentum_teacher": 0.99,  # with this value the run learns without collapsing
    "log.every_steps": 2,
    "checkpoint.every_steps": 4,
    "eval.knn_every_epochs": 0,
    "eval.knn_train": "shapes:85@train",
    "eval.knn_test": "shapes:30@test",
    "eval.resize": 16,
    "eval.crop": 16,
}
SPEED = ("seconds", "images_per_second", "data_wait", "device_memory_gib", "planned_memory_gib")
_compiled: dict[str, jax.stages.Compiled] = {}


class KilledError(Exception):
    """Ends a run in this process like a kill."""


def arguments(**changes: object) -> list[str]:
    """The command line of a tiny run; two underscores in a key stand for a dot."""
    keys = KEYS | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config.{key}={value}" for key, value in keys.items()]


def tiny_config(**changes: object) -> ConfigDict:
    """The config of the same run."""
    config = read_config(CONFIG)
    override(config, arguments(**changes))
    return config


def train_here(
    config: ConfigDict, workdir: Path, *, devices: int = 1, stop_after: int | None = None
) -> dict[str, Any]:
    """`train.run` on the first devices of this process; equal steps compile once per session."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step = {"seed": config.seed, "log": config.log.every_steps, "devices": devices}
    for section in ("model", "head", "loss", "optim", "crops", "train"):
        step |= {section: config[section].to_json()}

    def compile_once(settings: StepSettings, *rest: Any) -> Callable:
        key = json.dumps(step | {"steps_per_epoch": settings.steps_per_epoch})
        if key not in _compiled:
            _compiled[key] = compile_step(settings, *rest)
        return _compiled[key]

    compile_step = train.compile_step
    with (
        mock.patch.object(train, "compile_step", compile_once),
        mock.patch.object(sharding, "make_mesh", return_value=mesh),
        mock.patch.object(StopRequest, "should_stop", lambda _, step, every: step == stop_after),
        mock.patch.object(log, "plot_learning_curve"),  # takes a second each time
    ):
        return train.run(config, workdir)


@contextmanager
def started(
    workdir: Path, *settings: str, devices: int = 1, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Runs `python main.py` in a subprocess with its own devices; killed at the end if needed."""
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    with subprocess.Popen(
        [sys.executable, "main.py", "--config", CONFIG, "--workdir", str(workdir), *settings],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Polls often enough to notice even a checkpoint's temporary folder."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def whole() -> Path:
    """The folder of an uninterrupted run on one device."""
    return _shared("whole", tiny_config(), devices=1)


def scored() -> Path:
    """The folder of a run on eight devices with k-NN scores."""
    return _shared("scored", tiny_config(eval__knn_every_epochs=1), devices=8)


def _shared(name: str, config: ConfigDict, devices: int) -> Path:
    """Trains a run once for all workers."""
    workdir = Path(os.environ["DINO_JAX_TESTS_CACHE"]) / name
    with lock.wait_for(workdir.with_suffix(".lock")):
        if not workdir.exists():
            part = workdir.with_suffix(".part")
            train_here(config, part, devices=devices)
            part.rename(workdir)
    return workdir


def records(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of a log file without times."""
    lines = map(json.loads, (workdir / name).read_text().splitlines())
    return [{key: v for key, v in line.items() if key not in SPEED} for line in lines]


def steps(workdir: Path) -> list[int]:
    """The finished checkpoints of a run."""
    names = [path.name for path in (workdir / read.FOLDER).iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array in a run's last checkpoint by its path."""
    here = SingleDeviceSharding(jax.devices()[0])
    found = {}
    with ocp.StandardCheckpointer() as reader:
        for item in read.ARRAY_ITEMS:
            folder = (workdir / read.FOLDER / str(steps(workdir)[-1]) / item).absolute()
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                reader.metadata(folder).item_metadata.tree,
            )
            leaves = jax.tree_util.tree_leaves_with_path(reader.restore(folder, shapes))
            found |= {item + jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return found


def assert_equal(workdir: Path, expected: Path) -> None:
    """Asserts that two runs ended with equal bits and equal logs."""
    assert (workdir / "log.txt").read_bytes() == (expected / "log.txt").read_bytes()
    assert records(workdir) == records(expected)
    ours, theirs = arrays(workdir), arrays(expected)
    assert ours.keys() == theirs.keys()
    different = [k for k, x in ours.items() if x.tobytes() != theirs[k].tobytes()]
    assert not different
