"""Prints a benchmark's result with the machine it was measured on, as one JSON line.

python benchmarks/machine.py      # the machine alone
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
    *(f"jax-cuda{n}-plugin" for n in (12, 13)),
    *(f"nvidia-cudnn-cu{n}" for n in (12, 13)),
    "torch",
    "timm",
)


def host() -> dict[str, Any]:
    """Date, versions of packages, number of cores, and NVIDIA's driver where there is one."""
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        found["driver"] = lines[0] if lines else None
    return found


def device() -> dict[str, Any]:
    """The device that JAX computes on. Reserves its memory."""
    import jax  # here: a process without JAX can still describe its host

    first = jax.devices()[0]
    return {
        "backend": first.platform,
        "device": first.device_kind,
        "devices": jax.device_count(),
    }


def report(
    benchmark: str, result: dict[str, Any], *, computed_on: dict[str, Any] | None = None
) -> None:
    """Prints the JSON line of a result.

    Args:
      benchmark: name of the script.
      result: what it measured, and with which settings.
      computed_on: `device()` of the process that computed. Default: of this process.
    """
    if computed_on is None:
        computed_on = device()
    print(json.dumps({"benchmark": benchmark} | result | computed_on | host()))


if __name__ == "__main__":
    report("machine", {})
