"""Runs the benchmarks as a user does, at tiny sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TORCH = importlib.util.find_spec("torch") is not None
SMALL = [
    "--config=configs/default.py:debug",
    "--batch-size=4",
    "--config.model.overrides.depth=1",
    "--config.model.overrides.embed_dim=24",
    "--config.head.num_layers=1",
    "--config.head.out_dim=64",
]
TINY = [*SMALL, "--steps=1"]
# Compiling is most of the time here; and these processes need no virtual devices.
ENVIRONMENT = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": f"{os.environ['DINO_JAX_TESTS_CACHE']}/compiled",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
}
needs_torch = pytest.mark.skipif(
    not TORCH, reason="PyTorch is not installed: pip install -e '.[torch]'"
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository."""
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True
    )


def script(name: str, *arguments: str) -> dict[str, Any]:
    """What the last line of a benchmark says; it must succeed."""
    done = run(sys.executable, f"benchmarks/{name}.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def gpu_script(out: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `gpu.sh` at its reduced sizes."""
    tiny = {"OUT": str(out), "PYTHON": sys.executable, "DINO_JAX_BENCH_TINY": "1"}
    return run(str(BENCHMARKS / "gpu.sh"), *stages, **tiny | environment)


def rows(out: Path) -> list[dict[str, Any]]:
    """The results of `gpu.sh`."""
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
