"""Trains DINO: python main.py --config=configs/vit_small.py --workdir=runs/s16 --config.KEY=VALUE

The same command continues a run that was stopped. The settings are in configs/default.py.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dino_jax.distributed import initialize_if_launched
from dino_jax.errors import UsageError

CONFIG = config_flags.DEFINE_config_file("config", None, "The settings, a file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run; made if missing.")


def main(argv: list[str]) -> int:
    """Runs the training; exit code 0 finished or stopped, 1 diverged, 2 wrong usage."""
    try:
        if argv[1:]:
            raise UsageError(
                f"unknown argument {argv[1]!r}: settings are --config.SECTION.KEY=VALUE"
            )
        if CONFIG.value is None or not WORKDIR.value:
            raise UsageError(
                "--config and --workdir are needed, such as "
                "--config=configs/vit_small.py --workdir=runs/s16"
            )
        initialize_if_launched()
        from dino_jax import train
        from dino_jax.loop import TrainingDiverged
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train.run(CONFIG.value, WORKDIR.value)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    app.run(main)
