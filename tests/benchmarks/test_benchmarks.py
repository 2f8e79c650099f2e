"""Every benchmark runs at a tiny size and prints its JSON line; no time is asserted."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}  # no virtual devices
SMALL = """--config=configs/default.py:debug --batch-size=4 --config.model.overrides.depth=1
  --config.model.overrides.embed_dim=24 --config.head.num_layers=1 --config.head.out_dim=64
  --config.crops.local_number=0"""
CROPS = "--global-size=32 --local-size=16 --local-number=1"
ARGUMENTS = {  # the slowest first
    "peer_torch": f"{SMALL} --rounds=1 --steps=1 --threads=1 --variant modern",
    "features": f"{SMALL} --rounds=1 --steps=1",
    "train_step": f"{SMALL} --steps=1 --data=shapes:16",
    "convert": "--model=vit_tiny --out-dim=64",
    "scaling": f"{SMALL} --config.head.out_dim=256 --config.model.overrides.embed_dim=48"
    " --step-ms=1 --node=4 --link=1e9 --network=1e8 --gpus 4 8",
    "data": f"--number=8 --pil-number=2 --threads 1 --rounds=1 --batch-size=4 --canvas=64 {CROPS}",
    "augment": f"--batch=2 --canvas=64 --seconds=0 {CROPS}",
    "knn": "--queries=60 --bank=600 --width=16 --classes=7 --ks 1 9 --rounds=1 --tolerance=1e-6",
    "attention": "--images=1 --lengths 5 --crops 2 --heads=1 --head-dim=8 --rounds=1 --steps=1",
    "reference_tests": "tests/data/transforms/test_color.py -k gray",
    "flops": "--config=configs/vit_small.py",
    "jpeg_folder": "OUT/jpeg --number=2",
    "decode": "--number=2 --threads 1 --rounds=1",
    "machine": "",
}
KEYS = {  # besides those of the machine
    "peer_torch": "step_ms ratio ratio_range peak_memory_gib losses refused sides threads",
    "features": "images_per_s ratio apart image_size sides",
    "train_step": "images_per_s step_ms gflop_per_image utilisation peak_tflops peak_memory_gib"
    " crops_ms crops_share python_overhead_ms dispatch_ms compile_s data dtype attention",
    "convert": "model out_dim file_gib read_s read_peak_gib read_peak_over_file convert_s"
    " convert_peak_gib convert_peak_over_file",
    "scaling": "parameter_mb collectives_mb step_ms step_ms_from communication_ms efficiency",
    "data": "images_per_s over_pil ms_per_batch pack_images_per_s",
    "augment": "device_images_per_s pil_images_per_s_one_core ratio grey_levels_apart_mean",
    "knn": "queries bank width ks seconds ratio percent_apart",
    "attention": "ms ratio refused",
    "reference_tests": "passed tests platforms",
    "flops": "gflop_per_image",
    "jpeg_folder": "number mean_kb",
    "decode": "images_per_s over_pillow grey_levels_apart",
    "machine": "",
}
WHOLE_RUNS = ("startup", "learning_parity", "learning_torch")  # only their --help is run
TORCH = ("peer_torch", "learning_torch", "features", "convert", "knn")
MODULES = ("config_flag", "our_step")  # what benchmarks share


def command(name: str, out: Path) -> list[str]:
    arguments = shlex.split(ARGUMENTS[name].replace("OUT", str(out)))
    return [sys.executable, f"benchmarks/{name}.py", *arguments]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """All scripts, two at a time."""
    out = tmp_path_factory.mktemp("benchmarks")
    names = [n for n in ARGUMENTS if importlib.util.find_spec("torch") or n not in TORCH]

    def run(name: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(name, out), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
        )

    with ThreadPoolExecutor(2) as threads:
        yield {name: threads.submit(run, name) for name in names}
        threads.shutdown(cancel_futures=True)


def result_of(name: str, runs: dict[str, Future]) -> dict[str, Any]:
    if name not in runs:
        pytest.skip("PyTorch is not installed: pip install -e '.[torch]'")
    done = runs[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_every_script_is_run() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {
        *ARGUMENTS,
        *WHOLE_RUNS,
        *MODULES,
    }


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_help_of_benchmarks_that_train_whole_runs(name: str) -> None:
    if name in TORCH and not importlib.util.find_spec("torch"):
        pytest.skip("PyTorch is not installed: pip install -e '.[torch]'")
    words = [sys.executable, f"benchmarks/{name}.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/{name}.py" in done.stdout


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_json_line(name: str, runs: dict[str, Future]) -> None:
    result = result_of(name, runs)
    assert result["benchmark"] == name
    assert {"date", "cores", "jax", *KEYS[name].split()} <= result.keys()


def test_numbers_above_zero(runs: dict[str, Future]) -> None:
    result = result_of("train_step", runs)
    for key in ("images_per_s", "step_ms", "utilisation", "peak_memory_gib", "crops_ms"):
        assert result[key] > 0, key
    assert result["data"]["images_per_s"] > 0
    assert min(result_of("data", runs)["ms_per_batch"].values()) > 0


def test_operations_of_a_step(runs: dict[str, Future]) -> None:
    # 9.2 GFLOP per pass at 224 pixels (published) and 1.6 at 96. Two passes of the teacher, three
    # of the student for each view, and the head: 113.5. The last block for one token saves 7 %.
    flops = result_of("flops", runs)["gflop_per_image"]
    assert flops == pytest.approx(0.931 * 113.5, rel=0.01)
    # XLA also counts norms, softmax and optimizer, which weigh more in a network this small.
    step = result_of("train_step", runs)["gflop_per_image"]
    assert 0.9 < step["compiled"] / step["formula"] < 3


def test_both_sides_compute_the_same(runs: dict[str, Future]) -> None:
    """Scripts with a peer exit with 1 otherwise."""
    assert result_of("augment", runs)["grey_levels_apart_mean"] < 0.1
    losses = result_of("peer_torch", runs)["losses"]
    assert len({*losses["ours"]}) == 3, "the steps changed nothing"
    assert losses["modern"] == pytest.approx(losses["ours"], rel=1e-5)


def test_communication(runs: dict[str, Future]) -> None:
    result = result_of("scaling", runs)
    p = result["parameter_mb"]
    within, between = 3 / 4 * p, 1 / 4 * p * 10 / 2  # ms by links and by the network
    for mode, times in {"dp": 2, "fsdp": 3}.items():
        expected = {"4": times * within, "8": times * (within + between)}
        assert result["communication_ms"][mode] == pytest.approx(expected, abs=1e-3)
        for gpus, c in expected.items():
            shares = {"none": 1 / (1 + c), "full": 1 / max(1, c)}
            assert result["efficiency"][mode][gpus] == pytest.approx(shares, abs=2e-3)
    formula, compiled = (result["collectives_mb"][side] for side in ("formula", "compiled"))
    assert p <= compiled["dp"]["all-reduce"] < 1.05 * formula["dp"]["all-reduce"]
    for kind in ("all-gather", "reduce-scatter"):  # many small arrays are not sharded
        assert 0.75 < compiled["fsdp"][kind] / formula["fsdp"][kind] <= 1.01


def test_the_commands_for_a_gpu_exist(tmp_path: Path) -> None:
    """Runs gpu.sh with a `python` that prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$@"; echo\n')
    python.chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh"], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line.strip("\t").split("\t") for line in done.stdout.splitlines()]
    assert len(lines) > 10
    shared = (BENCHMARKS / "config_flag.py").read_text()
    for script, *arguments in lines:
        source = (ROOT / script).read_text() + shared
        for argument in arguments:
            flag = argument.partition("=")[0].replace("--no-", "--")
            if flag.startswith("--") and not flag.startswith("--config."):
                assert f'"{flag}"' in source, (script, argument)
            elif argument.startswith("tests/"):
                assert (ROOT / argument).exists(), argument
