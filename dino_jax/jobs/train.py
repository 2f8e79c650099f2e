"""Trains DINO: dino-jax train --config=vit_small --workdir=RUN --config.data.train=folder:IMAGES

The same command resumes a stopped run. Every key of configs/default.py can be set:
--config.optim.lr=0.001.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from dino_jax.backend import reset_jax_settings, start


class _ListConfigs(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dino_jax.config.file import list_configs

        for name, summary in list_configs().items():
            print(f"{name:16} {summary}")
        parser.exit()


def main(arguments: Sequence[str]) -> None:
    """Parses the command line of `train` and runs the training.

    Raises:
      UsageError: invalid arguments, or the run cannot start.
      SystemExit: code 1 if the run diverged.
    """
    parser = argparse.ArgumentParser(
        prog="dino-jax train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config CONFIG[:debug] --workdir DIR [--config.SECTION.KEY=VALUE ...]\n"
        "       %(prog)s --list",
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

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the errors that it raises
    # Imported here, because --help does not need JAX.
    reset_jax_settings()
    from dino_jax.config.file import override, read_config

    config = read_config(parsed.config)
    override(config, settings)
    start()
    from dino_jax.run.loop import TrainingDiverged
    from dino_jax.train import run

    try:
        run(config, parsed.workdir)
    except TrainingDiverged as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
