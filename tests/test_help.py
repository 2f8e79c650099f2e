"""`--help` is fast: it does not import what only a running job needs."""

import subprocess
import sys

import pytest

from dino_jax.cli import JOBS
from tests.support import runs

# Each takes a tenth of a second or more to import.
HEAVY = (
    "grain",
    "matplotlib",
    "orbax",
    "pyarrow",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
)
COMPUTING = ("flax", "jax", "numpy", "optax", "tyro")


def imported(code: str) -> set[str]:
    """The modules that some code has imported when it exits, with or without an error."""
    code = (
        f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_command_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"from dino_jax.cli import main; main({words})"
    assert not imported(code) & {*HEAVY, *COMPUTING}


def test_job_help_imports_nothing_heavy() -> None:
    """All jobs run in one process, which collects the imports of all."""
    code = f"""
from contextlib import suppress
from dino_jax.cli import main
for job in {list(JOBS)}:
    with suppress(SystemExit):
        main([job, "--help"])
"""
    assert not imported(code) & set(HEAVY)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_exists(name: str) -> None:
    function = JOBS[name].load(name)
    assert function.__name__ == name.replace("-", "_")
    assert function.__doc__
