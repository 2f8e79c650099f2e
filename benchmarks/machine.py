"""What a result was measured on; `gpu.sh` adds it to every line. Prints a JSON line.

python benchmarks/machine.py

Fails with the names of all packages that the benchmarks need and that are not installed.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

# Modules, where a package has another name; some are wanted by packages that do not install them.
NEEDED = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "array_record": "array_record",
    "grain": "grain",
    "ml_collections": "ml_collections",
    "ml_dtypes": "ml_dtypes",
    "numpy": "numpy",
    "PIL": "pillow",
    "tensorboardX": "tensorboardX",
    "tqdm": "tqdm",
    "tyro": "tyro",
    "docstring_parser": "docstring_parser",
    "typeguard": "typeguard",
    "portpicker": "portpicker",
}
WITH = {"torch": "peer, nor the reference of knn", "pytest": "check", "matplotlib": "startup"}
VERSIONS = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    *(f"jax-cuda{n}-plugin" for n in (12, 13)),
    *(f"nvidia-cudnn-cu{n}" for n in (12, 13)),
    "torch",
    "timm",
)


def missing(modules: Iterable[str]) -> list[str]:
    """Those that cannot be imported."""
    return [name for name in modules if find_spec(name) is None]


def versions() -> dict[str, str]:
    """The day, and what is installed of that which decides on speed."""
    found = {"date": time.strftime("%Y-%m-%d")}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def driver() -> str | None:
    """The version of NVIDIA's."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return said[0] if said else None


def about() -> dict[str, Any]:
    """Device, driver, cores, versions."""
    import jax  # not before it is known to be there

    device = jax.devices()[0]
    return versions() | {
        "backend": device.platform,
        "device": device.device_kind,
        "driver": driver(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    if names := [NEEDED[module] for module in missing(NEEDED)]:
        raise SystemExit(f"not installed: {', '.join(names)}")
    for module in missing(WITH):
        print(f"{module} is not installed: without it there is no {WITH[module]}", file=sys.stderr)
    print(json.dumps(about()))


if __name__ == "__main__":
    main()
