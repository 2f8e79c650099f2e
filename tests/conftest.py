"""All tests run offline, on the CPU, with eight virtual devices."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Compilation takes most of the time. Workers and their subprocesses share compiled programs, and
# nothing is written to the user's cache.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "DINO_JAX_TESTS_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="dino_jax_tests_")
    os.environ["DINO_JAX_TESTS_CACHE"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["DINO_JAX_TESTS_CACHE"] + "/compiled"

import jax
import numpy as np
import pytest
from PIL import Image

signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore SIGINT

LONGEST = ("test_train_parity.py", "test_benchmarks.py", "test_resume.py")  # slowest test files
GOLDENS = Path(__file__).parent / "goldens"
PARITY_GOLDENS = Path(os.environ.get("DINO_JAX_GOLDENS", GOLDENS))


def parity_cases(pattern: str) -> list[Path]:
    """The goldens that match a pattern. May be empty only if DINO_JAX_GOLDENS is set."""
    assert PARITY_GOLDENS.is_dir(), f"DINO_JAX_GOLDENS={PARITY_GOLDENS} is not a folder"
    cases = sorted(PARITY_GOLDENS.glob(pattern))
    assert cases or PARITY_GOLDENS != GOLDENS, f"{GOLDENS} has no {pattern}"
    return cases


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slowest files first, so that all workers finish at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The repository's goldens: numbers recorded from the reference implementation."""
    return GOLDENS


@pytest.fixture(scope="session")
def weights() -> str:
    """A file written by the reference, with a small backbone."""
    return str(GOLDENS / "pth/backbone.pth")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth image with many colours, 90 pixels wide and 60 high."""
    rows, columns = np.mgrid[:60, :90] / 60
    waves = [np.sin(4 * rows + k) * np.cos(3 * columns - k) for k in range(3)]
    return Image.fromarray(np.uint8(np.round(127.5 + 127 * np.stack(waves, -1))))


@pytest.fixture
def all_optimizations() -> Iterator[None]:
    """Compiles as in production, for networks that run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
