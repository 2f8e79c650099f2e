"""Trains DINO: python main.py --config=configs/vit_small.py --workdir=runs/s16

The same command continues a run that was stopped. Every key of configs/default.py can be set:
--config.optim.lr=0.001.
"""

import argparse
import logging
import signal
import sys

from dino_jax.cli import exit_code
from dino_jax.errors import UsageError


def main() -> int:
    """Runs the training; exit code 0 finished or stopped, 1 diverged, 2 wrong usage or storage."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="main.py --config FILE[:debug] --workdir DIR [--config.SECTION.KEY=VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the settings")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's folder; made if missing"
    )
    arguments, settings = parser.parse_known_args()

    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises as well
    # Imported here, since --help need not wait for JAX.
    from dino_jax.cache import keep_compiled_programs
    from dino_jax.config.file import override, read_config
    from dino_jax.distributed import initialize_if_launched

    try:
        config = read_config(arguments.config)
        override(config, settings)
        initialize_if_launched()
        keep_compiled_programs()
        from dino_jax import train
        from dino_jax.run.loop import TrainingDiverged

        try:
            train.run(config, arguments.workdir)
        except TrainingDiverged as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return exit_code(error, "; the same command continues")
    return 0


if __name__ == "__main__":
    # Until a run has something to save, and once it is told a second time, Ctrl-C ends it at once.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
