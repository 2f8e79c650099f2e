"""The settings that a benchmark runs with, given as to `main.py`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import versions

if TYPE_CHECKING:
    from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `configs`


def parser(docstring: str) -> argparse.ArgumentParser:
    """A parser of the flags that all benchmarks of a config share."""
    flags = argparse.ArgumentParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key of configs/default.py can be set: --config.model.dtype=bfloat16.",
        allow_abbrev=False,
    )
    default = ROOT / "configs" / "fashion_mnist.py"
    flags.add_argument("--config", default=str(default), metavar="FILE[:debug]")
    flags.add_argument("--batch-size", type=int, default=64, help="images a step, all devices")
    return flags


def load(flags: argparse.Namespace, overrides: list[str]) -> "ConfigDict":
    """The config that the flags name, with the keys that the rest of the command line sets."""
    from dino_jax.config.file import (
        override,
        read_config,  # not before --help is answered
    )

    config = read_config(flags.config)
    config.train.batch_size = flags.batch_size
    config.data.train = config.data.train or "none"  # it is not read
    override(config, overrides)
    return config


def describe(flags: argparse.Namespace, config: "ConfigDict") -> dict[str, Any]:
    """What a result says of its settings."""
    file, _, argument = flags.config.partition(":")
    crops = config.crops
    return versions() | {
        "config": Path(file).stem + (argument and f":{argument}"),
        "batch_size": config.train.batch_size,
        "crops": f"2x{crops.global_size} + {crops.local_number}x{crops.local_size}",
        "out_dim": config.head.out_dim,
        "remat": config.model.remat,
    }
