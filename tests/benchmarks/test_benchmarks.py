"""Every benchmark runs at a tiny size and says what it promises; no time is asserted."""

import io
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.benchmark_runs import (
    SMALL,
    TINY,
    TORCH,
    gpu_script,
    needs_torch,
    rows,
    run,
    script,
)

VARIANTS = ["eager", "modern"]
LEARNING = [  # in place of ten thousand pictures and a model of depth 4
    "--config.data.train=shapes:16@train",
    "--config.eval.knn_test=shapes:8@val",
    "--config.train.batch_size=8",
    "--config.train.epochs=2",
    "--config.model.overrides.depth=1",
    "--config.crops.local_number=1",
    "--config.head.out_dim=64",
]


SPREAD = ["--config.head.out_dim=256", "--config.model.overrides.embed_dim=48"]  # not too small


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """The slow runs, all under way: each is mostly one process that compiles."""
    out = tmp_path_factory.mktemp("results")
    with ThreadPoolExecutor(3) as threads:
        runs = {
            "peer_torch": threads.submit(
                script,
                "peer_torch",
                *TINY,
                "--rounds=1",
                "--threads=1",
                "--config.crops.local_number=1",
                "--variant",
                *VARIANTS,
            ),
            "train_step": threads.submit(
                script,
                "train_step",
                *TINY,
                "--config.model.dtype=bfloat16",
                "--config.crops.local_number=0",  # half as much to compile
                "--data=shapes:64",
            ),
            "augment": threads.submit(lambda: (gpu_script(out, "augment"), rows(out))),
            "data": threads.submit(
                script,
                "data",
                *("--number=8", "--pil-number=2", "--threads", "2", "--rounds=1", "--batch-size=4"),
                *("--canvas=64", "--global-size=32", "--local-size=16", "--local-number=1"),
            ),
            "startup": threads.submit(script, "startup", *SMALL, "--rounds=1", "--jobs", "inspect"),
            "variants": threads.submit(
                script, "variants", *TINY, "--rounds=1", "--variant", "blocked-loss"
            ),
            "features": threads.submit(script, "features", *TINY, "--rounds=1", "--steps=1"),
            "learning_parity": threads.submit(
                script, "learning_parity", f"--workdir={out / 'run'}", *LEARNING
            ),
            "learning_torch": threads.submit(
                script, "learning_torch", "--crops=ours", "--epochs=1", *LEARNING
            ),
            "scaling": threads.submit(script, "scaling", *SMALL, *SPREAD, "--step-ms=1"),
        }
        if not TORCH:
            for name in ("peer_torch", "features", "learning_torch"):
                del runs[name]
        yield runs


def test_train_step(started: dict[str, Future]) -> None:
    result = started["train_step"].result()
    assert result["benchmark"] == "train_step"
    assert result["config"] == "default:debug"
    assert result["batch_size"] == 4
    assert result["dtype"] == "bfloat16"
    assert result["attention"] == "xla"
    assert result["devices"] == 1
    above_zero = (
        "images_per_s",
        "step_ms",
        "utilisation",
        "peak_tflops",
        "peak_memory_gib",
        "crops_ms",
        "crops_share",
        "python_overhead_ms",
        "dispatch_ms",
        "compile_s",
    )
    for key in above_zero:
        assert result[key] > 0, key
    assert result["data"]["images_per_s"] > 0
    assert 0 <= result["data"]["wait_share"] <= 1
    # XLA also counts norms, softmax and optimizer, which weigh more in a network this small.
    flop = result["gflop_per_image"]
    assert 0.9 < flop["compiled"] / flop["formula"] < 2


@needs_torch
def test_peer_torch_computes_the_same(started: dict[str, Future]) -> None:
    result = started["peer_torch"].result()
    assert result["benchmark"] == "peer_torch"
    assert result["refused"] == {}
    assert list(result["ratio"]) == VARIANTS
    assert list(result["step_ms"]) == ["ours", *VARIANTS]
    assert min(result["step_ms"].values()) > 0
    ours = result["losses"]["ours"]
    assert len(set(ours)) == len(ours) == 3, "the steps changed nothing"
    for variant in VARIANTS:
        np.testing.assert_allclose(result["losses"][variant], ours, rtol=1e-5)


def test_variants_compute_the_same(started: dict[str, Future]) -> None:
    result = started["variants"].result()
    assert result["refused"] == {}
    assert list(result["ratio"]) == ["ours", "blocked-loss"]
    assert min(result["step_ms"].values()) > 0
    assert min(result["mb_per_image"].values()) > 0


@needs_torch
def test_features_agree_with_torch(started: dict[str, Future]) -> None:
    result = started["features"].result()
    assert result["apart"] < 1e-3
    assert result["ratio"] > 0


@needs_torch
def test_convert() -> None:
    result = script("convert", "--model=vit_tiny", "--out-dim=64")
    assert (result["benchmark"], result["model"]) == ("convert", "vit_tiny")
    assert 0.1 < result["file_gib"] < 0.3
    for work in ("read", "convert"):
        assert result[f"{work}_peak_gib"] > 0.8 * result["file_gib"], "it cannot have been read"
    assert result["read_peak_over_file"] <= 1.3


def test_gpu_script_runs_a_stage_and_prints_its_table(started: dict[str, Future]) -> None:
    done, results = started["augment"].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["benchmark"] for row in results] == ["augment"]
    assert results[0]["grey_levels_apart_mean"] < 0.1
    assert "| batch | canvas | device images/s |" in done.stdout
    assert f"| 2 | 64 | {results[0]['device_images_per_s']} |" in done.stdout
    assert "0 failures" in done.stdout


def test_data(started: dict[str, Future]) -> None:
    result = started["data"].result()
    assert result["benchmark"] == "data"
    assert result["images"] == 8
    assert list(result["images_per_s"]) == ["folder", "records", "pil"]
    for rates in (*result["images_per_s"].values(), *result["over_pil"].values()):
        assert list(rates) == ["2"]
        assert rates["2"] > 0
    stages = result["ms_per_batch"]
    assert list(stages) == ["read", "decode", "shrink", "pack", "copy", "transfer"]
    assert min(stages.values()) > 0


@needs_torch
def test_knn_of_both_sides_agrees() -> None:
    sizes = ("--queries=60", "--bank=600", "--width=16", "--classes=7", "--ks", "1", "9", "50")
    result = script("knn", *sizes, "--rounds=1", "--tolerance=1e-6")
    assert result["percent_apart"] == 0
    assert min(result["seconds"].values()) > 0
    assert result["ratio"] > 0
    assert 100 / 7 < result["top1"]["9"] < 100


def test_startup(started: dict[str, Future]) -> None:
    result = started["startup"].result()
    assert result["benchmark"] == "startup"
    seconds = result["first_step_s"]
    assert min(seconds.values()) > 0
    assert result["warm_share"] == pytest.approx(seconds["warm"] / seconds["cold"], abs=0.01)
    assert result["cache_mib"] > 0, "a cold start leaves its programs"
    assert list(result["help_s"]) == ["main", "jobs", "inspect"]
    assert result["help_s_max"] == max(result["help_s"].values()) > 0


def test_learning_parity(started: dict[str, Future]) -> None:
    result = started["learning_parity"].result()
    assert result["benchmark"] == "learning_parity"
    assert result["changed"] == LEARNING
    assert len(result["ours"]["loss"]) == 2
    assert min(result["ours"]["loss"]) > 0
    assert list(result["ours"]["knn10"]) == ["untrained", "1", "2"]
    assert {"date", "device", "cores", "jax"} <= result.keys()


def test_learning_parity_starts_a_new_run(tmp_path: Path) -> None:
    done = run(sys.executable, "benchmarks/learning_parity.py", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"--workdir={tmp_path} exists, and its run would be continued: give a new folder"
    )


@needs_torch
def test_learning_torch(started: dict[str, Future]) -> None:
    result = started["learning_torch"].result()
    assert (result["benchmark"], result["crops"]) == ("learning_torch", "ours")
    assert 0 < result["loss"][0] < 2 * np.log(64)
    assert {"date", "device", "cores", "jax", "torch"} <= result.keys()


def test_scaling_counts_what_the_formula_says(started: dict[str, Future]) -> None:
    result = started["scaling"].result()
    assert result["benchmark"] == "scaling"
    formula, compiled = (result["collectives_mb"][side] for side in ("formula", "compiled"))
    p = result["parameter_mb"]
    assert formula["dp"] == {"all-reduce": p}
    assert formula["fsdp"]["all-gather"] == pytest.approx(2 * p, abs=2e-4)  # both are rounded
    assert formula["fsdp"]["reduce-scatter"] == pytest.approx(p / 8, abs=1e-4)
    assert list(compiled["dp"]) == ["all-reduce"]
    assert p <= compiled["dp"]["all-reduce"] < 1.05 * p
    # Small arrays stay whole, and this model has many.
    for kind in ("all-gather", "reduce-scatter"):
        assert 0.75 < compiled["fsdp"][kind] / formula["fsdp"][kind] <= 1.01
    for mode in ("dp", "fsdp"):
        shares = [result["efficiency"][mode][n] for n in ("8", "64", "512")]
        assert all(0 < s["none"] < s["full"] <= 1 for s in shares)
        assert shares[0]["none"] > shares[1]["none"] > shares[2]["none"]


def test_attention() -> None:
    sizes = ("--images=1", "--lengths", "5", "--crops", "2", "--heads=1", "--head-dim=8")
    result = script("attention", *sizes, "--rounds=1", "--steps=1")
    assert result["ms"]["xla"]["5"] > 0
    assert "cannot be used for 5 tokens" in result["refused"]["5"]
    assert result["ms"]["cudnn"] == result["ratio"] == {}


def test_decode(tmp_path: Path) -> None:
    from jpeg_folder import write_pictures

    write_pictures(tmp_path, 2)
    result = script("decode", f"--folder={tmp_path}", "--threads", "2", "--rounds=1")
    assert (result["benchmark"], result["images"]) == ("decode", 2)
    cases = ["512 px, 2 threads", "224 px, 2 threads"]
    assert list(result["images_per_s"]["pillow"]) == cases
    assert min(result["images_per_s"]["pillow"].values()) > 0
    for apart in result["grey_levels_apart"].values():  # of the others, where they are installed
        assert max(most for most, _ in apart.values()) <= 1


def test_decoders_are_compared_with_pillow() -> None:
    from decode import fitting, grey_levels_apart, hard_cases, with_pillow

    assert grey_levels_apart(with_pillow, 224, hard_cases()) == (0, 0.0)
    brighter = lambda content, side: with_pillow(content, side) ^ 1  # noqa: E731
    assert grey_levels_apart(brighter, 224, hard_cases()) == (1, 1.0)
    for size in ((500, 375), (900, 4000), (100, 30), (449, 448)):
        image = Image.new("L", size)
        file = io.BytesIO()
        image.save(file, "JPEG")
        width, height, scale = fitting(size, 224)
        assert with_pillow(file.getvalue(), 224).shape == (height, width, 3)
        image = Image.open(file)
        image.draft(None, (width, height))
        assert image.size == tuple(-(-side // scale) for side in size)


def test_generated_pictures(tmp_path: Path) -> None:
    result = script("jpeg_folder", str(tmp_path / "jpeg"), "--number=3")
    assert result["number"] == 3
    sizes = []
    for path in sorted((tmp_path / "jpeg").iterdir()):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert sizes == [(500, 375), (375, 500), (500, 375)]
