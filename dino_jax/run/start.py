"""The first state of a run: restored, converted, from weights, or random."""

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
    """The state to train from, on the devices.

    A checkpoint in the workdir wins. A converted one counts epochs only; its step follows from the
    data. Without a checkpoint the run starts from `init_from`, or else from random weights.

    Args:
      config: checked.
      spec: the config's model.
      plan: of the run.
      checkpoints: of the workdir.
      num_images: in `data.train`.
      workdir: for messages.
    Raises:
      UsageError: the workdir contains another run, or `init_from` cannot be used.
    """
    former = checkpoints.latest_about()
    if former:
        resume.check_same_run(former, config, num_images=num_images, workdir=workdir)
    state = checkpoints.restore_latest(sharding.with_shardings(plan.shapes, plan.shardings))
    if state is not None:
        if converted := checkpoints.latest_about().get("converted"):
            steps = converted["epoch"] * plan.step.steps_per_epoch
            state = state.replace(step=state.step + steps)
        return Start(state, has_center=True, notes=resume.advice(former, config))
    if config.init_from:
        found = read_initial(config, spec, plan.shapes)  # before anything compiles
        return start_from(found, plan.first_state(config.seed))
    return Start(plan.first_state(config.seed), has_center=True, notes=[])


def with_center(start: Start, plan: Plan, batch: Batch) -> TrainState:
    """The state of a start; a missing center is computed from the teacher's logits for a batch."""
    if start.has_center:
        return start.state
    return start.state.replace(center=plan.center_of(start.state, batch))


def owes_epoch(state: TrainState, workdir: Path, steps_per_epoch: int) -> bool:
    """Whether the last finished epoch is still missing from the log, after a stop in between."""
    epoch, rest = divmod(int(state.step), steps_per_epoch)
    in_epoch = float(state.meters.epoch["steps"])  # 0 for a new or converted run
    return not rest and in_epoch > 0 and not is_logged(workdir, epoch - 1)
