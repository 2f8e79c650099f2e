"""Every benchmark runs at a tiny size and says what it promises; no time is asserted."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dino_jax.models import create_model
from dino_jax.out_of_memory import ACTIVATIONS

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
TORCH = importlib.util.find_spec("torch") is not None
VARIANTS = ["eager", "modern"]
SMALL = [
    "--config=configs/default.py:debug",
    "--batch-size=4",
    "--config.model.overrides.depth=1",
]
TINY = [*SMALL, "--steps=1"]
LEARNING = [  # in place of ten thousand pictures and a model of depth 4
    "--config.data.train=shapes:16@train",
    "--config.eval.knn_test=shapes:8@val",
    "--config.train.batch_size=8",
    "--config.train.epochs=2",
    "--config.model.overrides.depth=1",
    "--config.crops.local_number=1",
    "--config.head.out_dim=64",
]
# Compiling is most of the time here; and these processes need no virtual devices.
ENVIRONMENT = os.environ | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tests import the benchmarks' modules, as the scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


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
            "scaling": threads.submit(script, "scaling", *SMALL, "--step-ms=1"),
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


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
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


def test_a_variant_that_computes_something_else_is_seen() -> None:
    from variants import difference

    ours = [np.array([1.0, 4.0]), np.array([2.0])]
    assert difference(ours, ours) == 0
    assert difference(ours, [np.array([1.0, 5.0]), np.array([2.0])]) == 0.25


@pytest.mark.usefixtures("quick_compilation")
def test_a_variant_that_is_coarse_in_half_precision_alone_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits of two bits in place of seven; in float32 it computes the same."""
    from config_flag import load, parser
    from peer_torch import make_comparable
    from peers.ours import OurSide
    from variants import distances, objection

    from dino_jax.models.head import WeightNormLinear

    config = load(*parser("").parse_known_args([*SMALL, "--config.model.dtype=bfloat16"]))
    config.crops.local_number = 0
    make_comparable(config)

    class Here(OurSide):
        """As a side's process answers, in this one."""

        def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, method)(*args, **kwargs)

    side = Here(config)
    task = side.call("task")
    expected = side.call("derivatives", task, exact=True)
    exact, package = distances(side, task, expected)
    assert exact == 0
    assert objection(exact, package, package) is None
    logits = WeightNormLinear.__call__

    def coarse(self: WeightNormLinear, x: jax.Array) -> jax.Array:
        bits = 2 if self.dtype == jnp.bfloat16 else 23
        return jax.lax.reduce_precision(logits(self, x), exponent_bits=8, mantissa_bits=bits)

    monkeypatch.setattr(WeightNormLinear, "__call__", coarse)
    exact, rough = distances(side, task, expected)
    assert exact < 1e-6
    assert "from float32" in objection(exact, rough, package)


def test_a_variant_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import variants
    from peers.task import Task

    task = Task(sizes={}, weights={}, schedules={}, batch_size=4, dtype="float32", exact=True)
    answers = {"task": task, "derivatives": [np.ones(2)], "losses": [5.0], "seconds": 1.0}
    answers |= {"temporary_bytes": 8, "about": {}}

    class Sides:
        """The second cannot be opened, and says nothing."""

        def __init__(self, open_side: Callable[..., Any], config: None, name: str = "") -> None:
            if name == "scan":
                raise MemoryError

        def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
            return answers[method]

    monkeypatch.setattr(variants, "Worker", Sides)
    result = variants.compare(None, ["scan", "barriers"], rounds=1, steps=1)
    assert list(result["ratio"]) == ["ours", "barriers"]
    assert result["refused"] == {"scan": "MemoryError: "}


def test_a_process_ends_with_its_parent() -> None:
    program = (
        "import os; from peers.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    print(Worker(list).call('__len__'), flush=True)\n"
        "    os.kill(os.getpid(), 15)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}"},
        stdout=subprocess.PIPE,
    ) as process:
        # The end of the file comes when nobody has the pipe any more: the worker has it, too.
        assert process.communicate(timeout=60)[0] == b"0\n"
    assert process.returncode == -15


def test_a_gpu_is_shared_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from peers.worker import share_gpu

    from dino_jax.out_of_memory import FRACTIONS

    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    share_gpu(3)
    assert [os.environ.get(name) for name in FRACTIONS] == ["0.30", None]
    monkeypatch.delenv(FRACTIONS[0])
    monkeypatch.setenv(FRACTIONS[1], "0.5")
    share_gpu(3)
    assert FRACTIONS[0] not in os.environ


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
def test_features_agree_with_torch(started: dict[str, Future]) -> None:
    result = started["features"].result()
    assert result["apart"] < 1e-3
    assert result["ratio"] > 0


class Answers:
    """Stands in for a side's process: gives its losses, or fails."""

    def __init__(self, losses: list[float] | Exception) -> None:
        self.losses = losses

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[float]:
        assert method == "losses"
        if isinstance(self.losses, Exception):
            raise self.losses
        return self.losses


def test_a_peer_that_computes_something_else_is_refused() -> None:
    from peer_torch import check
    from peers.task import Task

    sides = {
        "ours": Answers([5.0, 6.0]),
        "same": Answers([5.0002, 6.0]),
        "other": Answers([5.0, 6.01]),
        "nan": Answers([5.0, float("nan")]),
        "broken": Answers(MemoryError("no room")),
    }
    task = Task(sizes={}, weights={}, schedules={}, batch_size=4, dtype="float32", exact=True)
    losses, refused = check(sides, task)
    assert list(refused) == ["other", "nan", "broken"]
    assert "no room" in refused["broken"]
    assert "6.01" in refused["other"]
    assert losses["same"] == [5.0002, 6.0]


def test_in_half_precision_only_the_first_loss_must_agree() -> None:
    from peer_torch import check
    from peers.task import Task

    class Rough(Answers):
        """Exact first, then as float16 with a scaler that skips a step."""

        def call(self, method: str, *args: Any, exact: bool) -> list[float]:
            return Answers([5.0, 6.0] if exact else self.losses).call(method)

    sides = {"ours": Answers([5.0, 6.0]), "scaled": Rough([5.01, 5.0]), "off": Rough([5.2, 6.0])}
    task = Task(sizes={}, weights={}, schedules={}, batch_size=4, dtype="bfloat16", exact=False)
    _, refused = check(sides, task)
    assert list(refused) == ["off"]


@pytest.mark.parametrize("side", [224, 96])
def test_counted_operations_of_a_forward_pass(side: int) -> None:
    from flops import vit_forward

    model = nnx.eval_shape(lambda: create_model("vit_small", rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    analysed = forward.lower(params, image).cost_analysis()["flops"]
    # What is not counted: norms, softmax, GELU, biases, and the resized position table.
    assert 0.95 < sum(vit_forward(model, side)) / analysed <= 1


def test_operations_of_a_training_step() -> None:
    from flops import flops_per_image

    from configs import vit_small

    # 9.2 GFLOP a pass for 224 pixels (published) and 1.6 for 96: 2 passes of the teacher, 3 of the
    # student for each view, the head: 113.5. The last block for one token saves 7 % of it.
    assert flops_per_image(vit_small.get_config()) == pytest.approx(0.931 * 113.5e9, rel=0.01)


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
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


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
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


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
def test_learning_torch(started: dict[str, Future]) -> None:
    result = started["learning_torch"].result()
    assert (result["benchmark"], result["crops"]) == ("learning_torch", "ours")
    assert 0 < result["loss"][0] < 2 * np.log(64)
    assert {"date", "device", "cores", "jax", "torch"} <= result.keys()


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
def test_a_step_of_the_peer_sends_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from learning_torch import first_weights
    from peers.torch_step import TorchStep

    sizes = {"embed_dim": 6, "patch_size": 4, "image_size": 8, "in_channels": 3, "num_heads": 1}
    sizes |= {"mlp_dim": 8, "depth": 1, "head_widths": [6, 8, 4], "out_dim": 16, "clip_grad": 3.0}
    sizes |= {"norm_last_layer": True, "student_temp": 0.1, "center_momentum": 0.9}
    names = ("lr", "weight_decay", "momentum", "teacher_temp")
    step = TorchStep(
        sizes,
        first_weights(sizes, seed=0),
        dict.fromkeys(names, np.linspace(0.04, 0.07, 4)),
        variant="modern",
        dtype=torch.float32,
        compiled=False,
        device=torch.device("cpu"),
    )
    views = [torch.ones(2, 3, 8, 8)] * 2
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, None)
    assert np.isfinite([float(step(views)) for _ in range(2)]).all()


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed: pip install 'dino_jax[torch]'")
def test_every_epoch_has_other_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    import learning_torch

    def crop_maker(config: None) -> Callable[..., Any]:
        return lambda batch, epoch: ((jnp.full((1, 2, 1, 1, 3), epoch),), None)

    monkeypatch.setattr(learning_torch, "crop_maker", crop_maker)
    views = learning_torch.our_views(None, [{}] * 6, steps=2)
    assert [float(each[0].max()) for each in views] == [0, 0, 1, 1, 2, 2]


def test_scaling_wants_nodes_of_gpus() -> None:
    done = run(sys.executable, "benchmarks/scaling.py", *SMALL, "--step-ms=1", "--node=0")
    assert done.returncode == 1
    assert done.stderr.strip() == "--node=0: give the GPUs of a node, at least 1"


def test_scaling_counts_what_the_formula_says(started: dict[str, Future]) -> None:
    result = started["scaling"].result()
    assert result["benchmark"] == "scaling"
    formula, compiled = (result["collectives_mb"][side] for side in ("formula", "compiled"))
    p = result["parameter_mb"]
    assert formula["dp"] == {"all-reduce": p}
    assert formula["fsdp"]["all-gather"] == pytest.approx(2 * p, abs=0.02)  # both are rounded
    assert formula["fsdp"]["reduce-scatter"] == pytest.approx(p / 8, abs=0.01)
    assert list(compiled["dp"]) == ["all-reduce"]
    assert p <= compiled["dp"]["all-reduce"] < 1.05 * p
    # Small arrays stay whole, and this model has many.
    for kind in ("all-gather", "reduce-scatter"):
        assert 0.75 < compiled["fsdp"][kind] / formula["fsdp"][kind] <= 1.01
    for mode in ("dp", "fsdp"):
        shares = [result["efficiency"][mode][n] for n in ("8", "64", "512")]
        assert all(0 < s["none"] < s["full"] <= 1 for s in shares)
        assert shares[0]["none"] > shares[1]["none"] > shares[2]["none"]


def test_activations_are_below_what_the_advice_reckons_with() -> None:
    depth = "--config.model.overrides.depth=4"
    result = script("activations", SMALL[0], depth, "--config.model.dtype=bfloat16")
    assert result["benchmark"] == "activations"
    kept, share = result["kept_mb"], result["share"]
    assert kept["none"] == pytest.approx(0.329, rel=0.02)  # GELU and LayerNorm keep inputs alone
    assert kept["none"] > kept["dots"] > kept["full"] > 0
    assert share["dots"] == pytest.approx(kept["dots"] / kept["none"], abs=0.01)
    assert share["none"] == 1
    assert all(share[policy] <= ACTIVATIONS[policy] for policy in ACTIVATIONS)


def test_seconds_of_a_collective() -> None:
    """64 GB over two nodes of four: 48 GB arrive by links, and 8 of a quarter by the network."""
    from scaling import Cluster, efficiency

    cluster = Cluster(node=4, link=12e9, network=1e9)
    assert cluster.one_way_seconds(64e9, 8) == pytest.approx(48 / 12 + 16 / 2)
    assert cluster.one_way_seconds(64e9, 4) == pytest.approx(48 / 12)
    assert efficiency(30, 10) == {"none": 0.75, "full": 1}
    assert efficiency(10, 40) == {"none": 0.2, "full": 0.25}


def test_bytes_of_collectives() -> None:
    from collectives import moved_bytes

    program = """
      %a = (f32[2,3]{1,0}, s32[]) all-reduce(%x, %y), replica_groups={}
      %b = bf16[10]{0} all-gather(%z), dimensions={0}
      %c = f32[5]{0} add(%p, %q)
      ROOT %d = pred[7]{0} all-reduce(%e)
    """
    assert moved_bytes(program) == {"all-reduce": 24 + 4 + 7, "all-gather": 20}


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
    done = run(sys.executable, *command, "tests/data/test_color.py")
    assert (done.returncode == 0) == (wanted == "cpu"), done.stdout + done.stderr
    assert message in done.stderr


def test_attention() -> None:
    sizes = ("--images=1", "--lengths", "5", "--crops", "2", "--heads=1", "--head-dim=8")
    result = script("attention", *sizes, "--rounds=1", "--steps=1")
    assert result["ms"]["xla"]["5"] > 0
    assert "cannot be used for 5 tokens" in result["refused"]["5"]
    assert result["ms"]["cudnn"] == result["ratio"] == {}


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
