"""`gpu.sh`, and what it calls beside the benchmarks."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.support.benchmark_runs import BENCHMARKS, SMALL, gpu_script, rows, run


def test_gpu_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    done = gpu_script(tmp_path, "check", "augment", "peer", DINO_JAX_BENCH_SECONDS="0")
    assert done.returncode == 1
    commands = [row["command"].split()[0] for row in rows(tmp_path)]
    assert commands == ["check", "augment", "peer_torch", "features"]
    assert all(row["why"] == "no time left of 0 s" for row in rows(tmp_path))
    assert "4 failures" in done.stdout


@pytest.mark.parametrize(
    ("stage", "seconds", "message"),
    [
        ("speed", "570", "unknown stage 'speed': choose from step, peer, check"),
        ("step", "ten", "DINO_JAX_BENCH_SECONDS=ten: give a whole number of seconds"),
    ],
)
def test_gpu_script_says_what_it_wants(
    stage: str, seconds: str, message: str, tmp_path: Path
) -> None:
    done = gpu_script(tmp_path, stage, DINO_JAX_BENCH_SECONDS=seconds)
    assert done.returncode == 2
    assert message in done.stderr


def test_gpu_script_starts_its_results_anew_and_says_where_they_are_from(tmp_path: Path) -> None:
    for stage in ("step", "variants:scan,barriers"):
        gpu_script(tmp_path, stage, DINO_JAX_BENCH_SECONDS="0")
    (row,) = rows(tmp_path)
    assert row["command"].endswith("--variant scan barriers")
    assert {"date", "device", "driver", "jax", "jaxlib"} <= row.keys()


def test_the_limits_of_the_usual_stages_fit_in_ten_minutes() -> None:
    stages = re.split(r"^(\w+)\(\) \{$", (BENCHMARKS / "gpu.sh").read_text(), flags=re.M)
    limits = {
        name: sum(map(int, re.findall(r"(?:measure |\blimit=)(?!400)(\d+)", body)))
        for name, body in zip(stages[1::2], stages[2::2], strict=True)
    }
    assert sum(limits[stage] for stage in ("step", "peer", "check")) <= 570


def test_packages_that_are_missing_are_named_at_once() -> None:
    from machine import NEEDED, missing

    assert missing(NEEDED) == []
    assert missing(["json", "no_such_package", "nor_this"]) == ["no_such_package", "nor_this"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("cpu", ""), ("gpu", "tests were to compute on gpu, and did on {'cpu'}")],
)
def test_tests_of_the_reference_see_the_device(wanted: str, message: str) -> None:
    command = ("benchmarks/reference_tests.py", wanted, "-k", "colour_cube")
    done = run(sys.executable, *command, "tests/data/transforms/test_color.py")
    assert (done.returncode == 0) == (wanted == "cpu"), done.stdout + done.stderr
    assert message in done.stderr


def test_a_step_that_does_not_fit_is_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_step

    def measure(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAnd more.")

    monkeypatch.setattr(train_step, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["train_step.py", *SMALL])
    train_step.main()
    result = json.loads(capsys.readouterr().out)
    assert result["out_of_memory"] == "RESOURCE_EXHAUSTED: Out of memory."
    assert (result["batch_size"], result["attention"]) == (4, "xla")


def test_tables_have_no_brackets() -> None:
    from table import COLUMNS, table

    columns = COLUMNS["data"] | {"apart": "apart", "gone": "gone.here"}
    row = {"images_per_s": {"folder": {"1": 5, "16": 7}}, "apart": {"224 px": [0, 0.5]}}
    shown = table([row], columns)
    assert "| 1: 5; 16: 7 |" in shown
    assert "| 224 px: 0, 0.5 |  |" in shown
    assert not set("{}[]'") & set(shown)
