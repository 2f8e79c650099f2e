"""Logs of a simulated run, and readers for their files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tensorboardX.proto.event_pb2 import Event

from dino_jax.run.log import RunLog, is_logged

STEPS_PER_EPOCH, EPOCHS, BATCH = 10, 4, 32


def open_log(workdir: Path, resume_step: int = 0, **changes: Any) -> RunLog:
    """The log of a run of four epochs."""
    settings = {
        "resume_step": resume_step,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "total_steps": EPOCHS * STEPS_PER_EPOCH,
        "batch_size": BATCH,
    }
    return RunLog(workdir, **(settings | changes))


def train(workdir: Path, resume_step: int = 0, stop_step: int = EPOCHS * STEPS_PER_EPOCH) -> None:
    """Simulates a run whose numbers depend only on the step.

    Intervals end every 4 steps and at the end of an epoch.
    """
    with open_log(workdir, resume_step) as log:
        if resume_step == 0:
            log.scores(0, {20: {"top1": 40.0, "top5": 80.0}})
        first = resume_step or 1  # an epoch that ends there may be missing
        for step in range(first, stop_step + 1):
            loss, lr = jnp.float32(6 - step / 7), np.float64(0.1 / step)
            if step > resume_step and (step % 4 == 0 or step % STEPS_PER_EPOCH == 0):
                log.interval(
                    step,
                    {"loss": loss, "lr": lr, "kl": 1 / step},
                    seconds=0.5,
                    data_seconds=0.1,
                )
            if step % STEPS_PER_EPOCH == 0:
                epoch = step // STEPS_PER_EPOCH - 1
                if step == resume_step and is_logged(workdir, epoch):
                    continue
                knn = {20: {"top1": 50.0 + step, "top5": 90.0}} if epoch % 2 else None
                log.epoch(epoch, {"loss": loss, "lr": lr, "weight_decay": 0.04, "kl": 0.5}, knn)


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a log file, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(workdir: Path) -> Iterator[Event]:
    """Reads TensorBoard files, made of length, its checksum, message, its checksum."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(workdir: Path) -> dict[tuple[str, int], float]:
    """The scalars in TensorBoard files by name and step."""
    return {(v.tag, e.step): v.simple_value for e in events(workdir) for v in e.summary.value}
