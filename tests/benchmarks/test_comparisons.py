"""Only what computes the same is compared, each side in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.benchmark_runs import BENCHMARKS, ENVIRONMENT, ROOT, SMALL, needs_torch


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
    from variants import distance, objection

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
    package = distance(side, task, expected, exact=False)
    assert objection(0.0, package, package) is None
    logits = WeightNormLinear.__call__

    def coarse(self: WeightNormLinear, x: jax.Array) -> jax.Array:
        bits = 2 if self.dtype == jnp.bfloat16 else 23
        return jax.lax.reduce_precision(logits(self, x), exponent_bits=8, mantissa_bits=bits)

    monkeypatch.setattr(WeightNormLinear, "__call__", coarse)
    exact, rough = (distance(side, task, expected, exact=exact) for exact in (True, False))
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

    from dino_jax.run.out_of_memory import FRACTIONS

    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    share_gpu(3)
    assert [os.environ.get(name) for name in FRACTIONS] == ["0.30", None]
    monkeypatch.delenv(FRACTIONS[0])
    monkeypatch.setenv(FRACTIONS[1], "0.5")
    share_gpu(3)
    assert FRACTIONS[0] not in os.environ


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


@needs_torch
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


@needs_torch
@pytest.mark.parametrize("kind", ["fused", "timm"])
def test_every_block_of_the_peers_computes_the_same(kind: str) -> None:
    import torch
    from peers.torch_model import BLOCKS

    if kind == "timm":
        pytest.importorskip("timm", reason="the blocks of timm's ViT: timm is not installed")
    torch.manual_seed(0)
    plain, other = BLOCKS["plain"](12, 3, 24), BLOCKS[kind](12, 3, 24)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(other(x), plain(x))


@needs_torch
def test_every_epoch_has_other_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    import learning_torch

    def crop_maker(config: None) -> Callable[..., Any]:
        return lambda batch, epoch: ((jnp.full((1, 2, 1, 1, 3), epoch),), None)

    monkeypatch.setattr(learning_torch, "crop_maker", crop_maker)
    views = learning_torch.our_views(None, [{}] * 6, steps=2)
    assert [float(each[0].max()) for each in views] == [0, 0, 1, 1, 2, 2]
