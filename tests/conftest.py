"""Every test runs offline on the CPU with eight virtual devices."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # no test writes to the user's folders

import jax
import pytest

LONGEST = ("test_train_parity.py", "test_benchmarks.py", "test_resume.py")  # of all files
GOLDENS = Path(os.environ.get("DINO_JAX_GOLDENS", Path(__file__).parent / "goldens"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that in the end no worker waits for another's."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of numbers recorded from the reference implementation."""
    return GOLDENS


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For networks that take longer to compile than to run; the numbers are the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
