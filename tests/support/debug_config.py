"""The small version of the default config."""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def config_with(**changes: Any) -> ConfigDict:
    """The small version of the default config, with some keys changed (`__` for a dot)."""
    config = default.get_config("debug")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config
