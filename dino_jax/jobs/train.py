"""Trains DINO: dino-jax train --config=vit_small --workdir=RUN --config.data.train=folder:IMAGES

The same command resumes a stopped run. Every key of configs/default.py can be set:
--config.optim.lr=0.001.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from dino_jax.errors import UsageError


class _ListConfigs(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dino_jax.config.file import list_configs

        for name, summary in list_configs().items():
            print(f"{name:16} {summary}")
        parser.exit()


def main(arguments: Sequence[str], prog: str = "dino-jax train") -> int:
    """Runs the command line of a training run.

    Args:
      arguments: without the program's name.
      prog: the program's name, for `--help`.
    Returns: the exit code: 0 finished or stopped, 1 diverged, 2 wrong usage or failing storage.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config CONFIG[:debug] --workdir DIR [--config.SECTION.KEY=VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--list", action=_ListConfigs, nargs=0, help="list the configs and exit")
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help="a name from --list, or a Python file"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's folder; created if missing"
    )
    parsed, settings = parser.parse_known_args(arguments)

    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also logs what it raises
    # Imported here: --help needs no JAX.
    from dino_jax.cache import keep_compiled_programs
    from dino_jax.cli import exit_code
    from dino_jax.config.file import override, read_config
    from dino_jax.distributed import initialize_if_launched

    try:
        config = read_config(parsed.config)
        override(config, settings)
        initialize_if_launched()
        keep_compiled_programs()
        from dino_jax import train
        from dino_jax.run.loop import TrainingDiverged

        try:
            train.run(config, parsed.workdir)
        except TrainingDiverged as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return exit_code(error, "; the same command continues")
    return 0
