"""Training, from a config to a run folder: `run` is the story, the functions below its chapters."""

import itertools
import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.config import build, checks
from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.sources.opening import open_source
from dino_jax.errors import UsageError
from dino_jax.run import resume
from dino_jax.run.interrupt import StopRequest
from dino_jax.run.learning_curve import plot_learning_curve
from dino_jax.run.log import RunLog, is_logged
from dino_jax.run.loop import Cadence, train_loop
from dino_jax.run.online_knn import OnlineKnn
from dino_jax.run.out_of_memory import MemoryGuard, Need
from dino_jax.run.plan import make_plan
from dino_jax.run.sheet import RunSheet
from dino_jax.training import health
from dino_jax.training.state import TrainState
from dino_jax.training.step import compile_step
from dino_jax.weights.initial import find, start_from

SHEET_FILE = "attention.png"


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains as a config says, or continues the run that the folder holds.

    Args:
      config: as `configs/default.py` describes it.
      workdir: the run's folder; made if missing.
    Returns: {step, total_steps, finished, metrics, health, knn}, the last three of the last
      interval and epoch that had them.
    Raises:
      UsageError: config, data or folder cannot be used, which is said before the step compiles; or
        the devices have too little memory.
      TrainingDiverged: three steps in a row were not finite.
    """
    workdir = Path(os.path.expanduser(workdir))
    mesh = sharding.make_mesh()

    # What is wrong with settings, data or folder is said here, within seconds.
    checks.check(config, mesh.size)
    source = open_source(config.data.train)
    batch_size = config.train.batch_size
    steps_per_epoch = len(source) // batch_size
    if not steps_per_epoch:
        raise UsageError(
            f"{config.data.train} has {len(source)} images, less than one batch of "
            f"train.batch_size={batch_size}: choose a smaller batch or more images"
        )
    total_steps = config.train.epochs * steps_per_epoch
    records = Records(
        source, max_unreadable=config.data.max_unreadable, channels=len(config.crops.mean)
    )
    records.read_or_next(0, decode)  # raises where none can be read
    knn = OnlineKnn(config, mesh, records) if config.eval.knn_every_epochs else None
    draw_sheet = RunSheet(config, source, mesh) if config.log.attention_sheet else None

    # Shapes, then shardings, then arrays: the state never lies on one device alone.
    plan = make_plan(config, mesh, steps_per_epoch=steps_per_epoch)

    with (
        StopRequest() as stop,  # outermost: a signal must not cut off the last save
        MemoryGuard(config, Need.of(plan.shapes, plan.shardings, mesh), mesh.size) as memory,
        RunCheckpoints(
            workdir,
            about={"config": json.loads(config.to_json()), "num_images": len(source)},
            keep_every_steps=config.checkpoint.keep_every_epochs * steps_per_epoch,
        ) as checkpoints,
    ):
        notes, has_center = checks.advice(config), True
        if former := checkpoints.latest_about():
            resume.check_same_run(former, config, num_images=len(source), workdir=workdir)
            notes += resume.advice(former, config)
        state = checkpoints.restore_latest(sharding.with_shardings(plan.shapes, plan.shardings))
        if state is None:
            if config.init_from:  # looked for before anything compiles
                found = find(config, plan.shapes)
                state, has_center, said = start_from(found, plan.first_state(config.seed))
                notes += said
                del found  # as large as the state
            else:
                state = plan.first_state(config.seed)
        elif converted := checkpoints.latest_about().get("converted"):
            # It counts epochs only: how many steps they have follows from the data.
            state = state.replace(step=state.step + converted["epoch"] * steps_per_epoch)
        start = int(state.step)
        epoch, rest = divmod(start, steps_per_epoch)
        in_epoch = float(state.meters.epoch["steps"])  # none where a converted run starts
        owes_epoch = not rest and in_epoch > 0 and not is_logged(workdir, epoch - 1)
        if start >= total_steps and not owes_epoch:
            print(f"{workdir} is finished: all {total_steps} steps are done")
            draw_pictures(workdir, state, draw_sheet)
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
            for sentence in notes:
                log.message(f"note: {sentence}")
            first = next(batches)  # data that breaks off at once is found before the step compiles
            if not has_center:
                state = state.replace(center=plan.center_of(state, first))
            log.message("compiling the training step")
            step_fn = compile_step(plan.step, state, first, plan.shardings)
            memory.plan(step_fn)
            log.message(size_line(plan.shapes, memory.need))
            log.note_memory(memory.need.total)
            # Nothing here may hold the first batch: once used, it would only take memory.
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
                owes_epoch=owes_epoch,
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
                log.message(f"where the teacher looks: {workdir / SHEET_FILE}")
            if records.num_unreadable:
                log.message(
                    f"{records.num_unreadable} images could not be read and were replaced; the "
                    "warnings above name them"
                )
            if result["step"] == total_steps:
                log.message(f"finished: logs, learning curve and checkpoints are in {workdir}")
            elif stop.signal_name:
                log.message(
                    f"{stop.signal_name}: saved after step {result['step']} of {total_steps}; the "
                    "same command continues"
                )
    return result | {"total_steps": total_steps, "finished": result["step"] == total_steps}


def draw_pictures(workdir: Path, state: TrainState, draw_sheet: RunSheet | None) -> None:
    """Draws what a run that was killed after its last step may not have come to draw."""
    if draw_sheet:
        draw_sheet(state.teacher_params, state.teacher_batch_stats, workdir / SHEET_FILE)
    if jax.process_index() == 0:
        with suppress(UsageError):  # the logs of a run may have been removed
            plot_learning_curve(workdir)


def size_line(shapes: TrainState, need: Need) -> str:
    """How large a run is, in a sentence."""
    parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
    return (
        f"processes: {jax.process_count()}, devices: {jax.device_count()}; "
        f"{parameters / 1e6:.1f} M parameters; {need}"
    )
