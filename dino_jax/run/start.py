"""The initial state of a run: restored from a checkpoint, from given weights, or random."""

from pathlib import Path

from ml_collections import ConfigDict

from dino_jax import sharding
from dino_jax.checkpoints.checkpoint import RunCheckpoints
from dino_jax.config.spec import ModelSpec
from dino_jax.run import resume
from dino_jax.run.log import is_logged
from dino_jax.run.plan import Plan
from dino_jax.training.state import TrainState
from dino_jax.training.step import Batch
from dino_jax.weights.initial import Start, read_initial, start_from


def start_or_resume(
    config: ConfigDict,
    spec: ModelSpec,
    plan: Plan,
    checkpoints: RunCheckpoints,
    *,
    num_images: int,
    workdir: Path,
) -> Start:
    """The state to start training from, on the devices.

    A checkpoint in the workdir takes precedence. Without one, the run starts from `init_from` or,
    if that is not set, from random weights. A converted checkpoint counts only epochs; its step
    number follows from the current steps per epoch.

    Args:
      config: a checked config.
      spec: the config's model.
      plan: the run's plan.
      checkpoints: the checkpoints in the workdir.
      num_images: the number of images in `data.train`.
      workdir: the run's folder, for messages.
    Raises:
      UsageError: the workdir contains another run, or `init_from` cannot be used.
    """
    previous = checkpoints.latest_about()
    if previous:
        resume.check_same_run(previous, config, num_images=num_images, workdir=workdir)
    state = checkpoints.restore_latest(sharding.with_shardings(plan.shapes, plan.shardings))
    if state is not None:
        if converted := checkpoints.latest_about().get("converted"):
            steps = converted["epoch"] * plan.step.steps_per_epoch
            state = state.replace(step=state.step + steps)
        return Start(state, has_center=True, notes=resume.advice(previous, config))
    if config.init_from:
        found = read_initial(config, spec, plan.shapes)  # before anything compiles
        return start_from(found, plan.first_state(config.seed))
    return Start(plan.first_state(config.seed), has_center=True, notes=[])


def with_center(start: Start, plan: Plan, batch: Batch) -> TrainState:
    """The initial state. A missing center is computed from the teacher's logits for a batch."""
    if start.has_center:
        return start.state
    return start.state.replace(center=plan.compute_center(start.state, batch))


def has_unlogged_epoch(state: TrainState, workdir: Path, steps_per_epoch: int) -> bool:
    """Whether a run was stopped after saving an epoch, but before logging it."""
    epoch, rest = divmod(int(state.step), steps_per_epoch)
    in_epoch = float(state.meters.epoch["steps"])  # 0 for a new or converted run
    return not rest and in_epoch > 0 and not is_logged(workdir, epoch - 1)
