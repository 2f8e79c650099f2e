"""The config of a benchmark, given on the command line as to `main.py`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `configs`


def parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks with a config share."""
    flags = argparse.ArgumentParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key of configs/default.py can be set: --config.model.dtype=bfloat16.",
        allow_abbrev=False,
    )
    default = ROOT / "configs" / "fashion_mnist.py"
    flags.add_argument("--config", default=str(default), metavar="FILE[:debug]")
    flags.add_argument("--batch-size", type=int, default=64, help="images per step, all devices")
    return flags


def load(flags: argparse.Namespace, overrides: list[str]) -> "ConfigDict":
    """Loads the config file and applies the keys set on the command line."""
    from dino_jax.config.file import override, read_config  # slow to import: not for --help

    config = read_config(flags.config)
    config.train.batch_size = flags.batch_size
    config.data.train = config.data.train or "none"  # required, but not read
    override(config, overrides)
    return config


def describe(flags: argparse.Namespace, config: "ConfigDict") -> dict[str, Any]:
    """The settings that a result depends on."""
    file, _, argument = flags.config.partition(":")
    crops = config.crops
    return {
        "config": Path(file).stem + (argument and f":{argument}"),
        "batch_size": config.train.batch_size,
        "crops": f"2x{crops.global_size} + {crops.local_number}x{crops.local_size}",
        "out_dim": config.head.out_dim,
        "remat": config.model.remat,
    }
