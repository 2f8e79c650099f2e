"""The kernels of attention, and which of them is chosen.

No GPU is needed: where cuDNN's kernel would be called, XLA's stands in for it.
"""

import re
from collections.abc import Callable
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs.default
from dino_jax.config import build, checks
from dino_jax.errors import UsageError
from dino_jax.models import attention, create_model
from dino_jax.models.attention_kernel import KernelChoice, choose_kernel, what_is_wrong
from tests.support import runs
from tests.support.reference import recipe_model

SHAPE = (3, 17, 16)  # heads, tokens, channels of a head
LENGTHS = (17, 5)
KERNEL = jax.nn.dot_product_attention


def stand_in(*arrays: jax.Array, implementation: str) -> jax.Array:
    """What cuDNN would compute."""
    assert implementation == "cudnn"
    return KERNEL(*arrays, implementation="xla")


def wrong_at_17(*arrays: jax.Array, implementation: str) -> jax.Array:
    factor = 1.2 if arrays[0].shape[1] == 17 else 1
    return stand_in(*arrays, implementation=implementation) * factor


def missing(*arrays: jax.Array, implementation: str) -> jax.Array:
    raise RuntimeError("cuDNN is not here\nand more")


def kernel_is(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., jax.Array]) -> None:
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)


choose = partial(
    choose_kernel,
    dtype=jnp.bfloat16,
    num_heads=3,
    head_dim=16,
    lengths=LENGTHS,
    platform="gpu",
    devices=jax.devices(),  # stand in for GPUs
)


def test_a_kernel_that_computes_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_is(monkeypatch, stand_in)
    assert choose("auto") == choose("cudnn") == KernelChoice("cudnn")
    assert choose("xla") == KernelChoice("xla")
    assert choose("auto", dtype=jnp.float32) == KernelChoice("xla")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (wrong_at_17, r"is off by 0\.\d+ of its largest value for 17 tokens"),
        (missing, r"does not work for 17 tokens \(cuDNN is not here\)"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cudnn"])
def test_a_kernel_that_does_not_is_left(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., jax.Array], said: str, asked: str
) -> None:
    kernel_is(monkeypatch, kernel)
    chosen, note = choose(asked)
    assert chosen == "xla"
    assert re.search(said, note)
    assert choose(asked, lengths=(5,)).kernel == ("cudnn" if kernel is wrong_at_17 else "xla")


def test_without_a_gpu() -> None:
    on_cpu = partial(choose, platform="cpu")
    assert on_cpu("auto") == KernelChoice("xla")
    assert "bfloat16 on a GPU" in on_cpu("cudnn").note
    with pytest.raises(UsageError, match=r"model\.attention='flash' is unknown: choose"):
        on_cpu("flash")


def test_wrong_gradients_are_seen() -> None:
    """The result may be right all the same."""

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.plain_attention(q, k, v)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return attend(*arrays), arrays

    def backward(arrays: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        _, pull_back = jax.vjp(attention.plain_attention, *arrays)
        dq, dk, dv = pull_back(cotangent)
        return dq, dk * 1.1, dv

    attend.defvjp(forward, backward)
    assert "largest value for 17 tokens" in what_is_wrong(
        attend, SHAPE, jnp.bfloat16, jax.devices()
    )
    assert what_is_wrong(attention.plain_attention, SHAPE, jnp.bfloat16, jax.devices()) is None
    not_a_number = lambda q, k, v: attention.plain_attention(q, k, v) * jnp.nan  # noqa: E731
    assert "off by nan of its" in what_is_wrong(not_a_number, SHAPE, jnp.bfloat16, jax.devices())


def test_a_network_is_the_same_with_either_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = mock.Mock(wraps=stand_in)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    sizes = {"patch_size": 4, "image_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    plain, fused = (
        recipe_model("vit_tiny", **sizes, dtype=jnp.bfloat16, attention=kernel)(images)
        for kernel in attention.KERNELS
    )
    assert float(jnp.abs(plain - fused).max()) < 0.05  # features are of order 1
    assert kernel.call_count == 1  # the last block is computed for the class token alone


def test_refuses_what_a_network_cannot_have() -> None:
    with pytest.raises(UsageError, match="attention='flash' is unknown"):
        create_model("vit_tiny", attention="flash")
    with pytest.raises(UsageError, match="needs a 16-bit dtype: set dtype"):
        create_model("vit_tiny", attention="cudnn")


@pytest.mark.parametrize("sizes", [{"embed_dim": 2}, {"embed_dim": 0}, {"num_heads": -1}])
def test_sizes_are_checked_before_the_kernel(sizes: dict[str, int]) -> None:
    config = configs.default.get_config("debug")
    config.data.train = "shapes:64@train"
    config.model.update(dtype="bfloat16", overrides=sizes)
    (name,) = sizes
    with pytest.raises(UsageError, match=f"{name}={sizes[name]}"):
        checks.check(config, 1)


def test_a_config_is_checked_at_its_own_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.default.get_config("debug")
    config.model.dtype = "bfloat16"
    lengths = []

    def noting(*arrays: jax.Array, implementation: str) -> jax.Array:
        lengths.append(arrays[0].shape[1])
        return stand_in(*arrays, implementation=implementation)

    kernel_is(monkeypatch, noting)
    spec, note = build.compute_spec(config, "gpu", jax.devices())
    assert (spec.attention, spec.dtype, note) == ("cudnn", "bfloat16", None)
    sides = config.crops.global_size, config.crops.local_size, config.eval.crop
    assert set(lengths) == {1 + (side // config.model.patch_size) ** 2 for side in sides}

    kernel_is(monkeypatch, missing)
    spec, note = build.compute_spec(config, "gpu", jax.devices())
    assert spec.attention == "xla"
    assert "cuDNN is not here" in note
    assert build.compute_spec(config, "gpu", ())[0].attention == "cudnn"  # nothing to check it on


def test_no_room_below_the_run_asks_for_the_platform() -> None:
    """Machine-dependent choices are made once, by the run and the jobs."""
    asking = [
        str(path.relative_to(runs.ROOT / "dino_jax"))
        for path in sorted((runs.ROOT / "dino_jax").rglob("*.py"))
        if "default_backend" in path.read_text()
    ]
    assert asking == ["backend.py", "cache.py"]  # called by commands, before anything is computed
