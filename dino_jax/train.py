"""Trains DINO from a config: `run` is a whole training run from top to bottom."""

import itertools
import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.backend import check_devices, check_jax_settings, describe_devices
from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.config import build, checks
from dino_jax.config.file import checked_config
from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.sources import open_source
from dino_jax.data.sources.folder import check_apart
from dino_jax.errors import UsageError
from dino_jax.paths import local_path
from dino_jax.run.interrupt import StopRequest
from dino_jax.run.learning_curve import plot_learning_curve
from dino_jax.run.log import RunLog
from dino_jax.run.loop import Cadence, train_loop
from dino_jax.run.online_knn import OnlineKnn
from dino_jax.run.out_of_memory import MemoryGuard, Need
from dino_jax.run.plan import make_plan
from dino_jax.run.sheet import RunSheet
from dino_jax.run.start import has_unlogged_epoch, start_or_resume, with_center
from dino_jax.training import health
from dino_jax.training.state import TrainState
from dino_jax.training.step import compile_step

SHEET_FILE = "attention.png"


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains a new run, or resumes the run in a folder.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save a checkpoint and end the run after the current
    step, except in a thread that is not the main one, where signals have no effect on the run.

    Args:
      config: see `configs/default.py` for every key.
      workdir: the run's folder; created if missing.
    Returns: {step, total_steps, finished, metrics, health, knn}; the last three are the latest
      ones, and missing if there are none.
    Raises:
      UsageError: config, data, folder or JAX's settings cannot be used, which is detected before
        the step compiles; or the devices have too little memory.
      TrainingDiverged: loss or gradients were not finite in three consecutive steps.
    """
    check_jax_settings()
    check_devices()
    config = checked_config(config)
    workdir = local_path(workdir, "workdir")
    mesh = sharding.make_mesh()

    # Fail early: problems with settings, data or folder are reported within seconds.
    checks.check(config, mesh.size)
    # All choices that depend on the machine are made here, once.
    spec, kernel_note = build.compute_spec(
        config, mesh.devices.flat[0].platform, mesh.local_devices
    )
    source = open_source(config.data.train)
    batch_size = config.train.batch_size
    steps_per_epoch = len(source) // batch_size
    if not steps_per_epoch:
        raise UsageError(
            f"{config.data.train} has {len(source)} images, fewer than one batch of "
            f"train.batch_size={batch_size}: use a smaller batch or more images"
        )
    total_steps = config.train.epochs * steps_per_epoch
    records = Records(
        source,
        max_unreadable=config.data.max_unreadable,
        max_pixels=config.data.max_pixels,
        channels=len(config.crops.mean),
    )
    records.read_or_next(0, decode)  # raises if no image can be read
    knn = OnlineKnn(config, spec, mesh, records) if config.eval.knn_every_epochs else None
    for each in (source, *(knn.sources if knn else ())):
        check_apart(each, workdir, "workdir")
    draw_sheet = RunSheet(config, spec, source, mesh) if config.log.attention_sheet else None

    # Shapes, then shardings, then arrays: the whole state is never on one device.
    plan = make_plan(config, spec, mesh, steps_per_epoch=steps_per_epoch)

    with (
        StopRequest() as stop,  # outermost, so that a signal cannot interrupt the last save
        MemoryGuard(Need.of(plan.shapes, plan.shardings, mesh)) as memory,
        RunCheckpoints(
            workdir,
            about={"config": json.loads(config.to_json()), "num_images": len(source)},
            keep_every_steps=config.checkpoint.keep_every_epochs * steps_per_epoch,
        ) as checkpoints,
    ):
        initial = start_or_resume(
            config, spec, plan, checkpoints, num_images=len(source), workdir=workdir
        )
        start = int(initial.state.step)
        unlogged = has_unlogged_epoch(initial.state, workdir, steps_per_epoch)
        if start >= total_steps and not unlogged:
            print(f"{workdir} is finished: all {total_steps} steps are done")
            draw_pictures(workdir, initial.state, draw_sheet)
            return {"step": start, "total_steps": total_steps, "finished": True}

        numpy_batches = train_batches(
            records,
            batch_size=batch_size,
            seed=config.seed,
            start_step=start,
            canvas_size=config.data.canvas_size,
            num_threads=config.data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with (
            DevicePrefetch(numpy_batches, sharding.batch_sharded(mesh)) as batches,
            RunLog(
                workdir,
                resume_step=start,
                steps_per_epoch=steps_per_epoch,
                total_steps=total_steps,
                batch_size=batch_size,
                is_main=jax.process_index() == 0,
            ) as log,
        ):
            advice = checks.advice(config) + ([kernel_note] if kernel_note else [])
            for sentence in (*advice, *initial.notes):
                log.message(f"note: {sentence}")
            first = next(batches)  # raises for unreadable data before the step compiles
            state = with_center(initial, plan, first)
            del initial  # its arrays will be donated to the step
            log.message("compiling the training step")
            step_fn = compile_step(plan.step, state, first, plan.shardings)
            memory.add_step(step_fn)
            log.message(size_line(plan.shapes, memory.need))
            log.set_planned_memory(memory.need.total)
            # Drop all references to the first batch, so that its memory is freed after the step.
            all_batches = itertools.chain(iter([first]), batches)
            del first
            score = lambda state: knn(state.teacher_params, state.teacher_batch_stats)  # noqa: E731
            if knn and config.eval.knn_at_start and start == 0:
                log.scores(0, score(state))
            state, result = train_loop(
                state,
                step_fn,
                all_batches,
                data_seconds=lambda: batches.wait_seconds,
                start=start,
                has_unlogged_epoch=unlogged,
                cadence=Cadence(
                    steps_per_epoch=steps_per_epoch,
                    total_steps=total_steps,
                    log_every=config.log.every_steps,
                    save_every=config.checkpoint.every_steps,
                    knn_every_epochs=config.eval.knn_every_epochs,
                ),
                schedules=build.make_schedules(config, steps_per_epoch),
                assess=partial(
                    health.assess,
                    num_prototypes=config.head.out_dim,
                    warmup_steps=config.optim.warmup_epochs * steps_per_epoch,
                ),
                score=score,
                log=log,
                checkpoints=checkpoints,
                stop=stop,
            )
            checkpoints.wait()
            if draw_sheet and result["step"] == total_steps:
                draw_sheet(state.teacher_params, state.teacher_batch_stats, workdir / SHEET_FILE)
                log.message(f"attention maps of the teacher: {workdir / SHEET_FILE}")
            if records.num_unreadable:
                log.message(
                    f"{records.num_unreadable} images could not be read and were replaced; see the "
                    "warnings above"
                )
            if result["step"] == total_steps:
                log.message(f"finished: logs, learning curve and checkpoints are in {workdir}")
            elif stop.signal_name:
                log.message(
                    f"{stop.signal_name}: saved after step {result['step']} of {total_steps}; run "
                    "the same command to resume"
                )
    return result | {"total_steps": total_steps, "finished": result["step"] == total_steps}


def draw_pictures(workdir: Path, state: TrainState, draw_sheet: RunSheet | None) -> None:
    """Redraws the pictures of a finished run, in case it was killed before drawing them."""
    if draw_sheet:
        draw_sheet(state.teacher_params, state.teacher_batch_stats, workdir / SHEET_FILE)
    if jax.process_index() == 0:
        with suppress(UsageError):  # the logs may have been deleted
            plot_learning_curve(workdir)


def size_line(shapes: TrainState, need: Need) -> str:
    """Number of processes, devices and parameters, and memory, in one line."""
    parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
    return (
        f"processes: {jax.process_count()}, devices: {describe_devices()}; "
        f"{parameters / 1e6:.1f} M parameters; {need}"
    )


if __name__ == "__main__":
    from dino_jax.cli import main

    main(["train", *sys.argv[1:]])
