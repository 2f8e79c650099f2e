"""ResNets: the reference's numbers, and properties of their own."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import ResNet, create_model
from dino_jax.models.network import split
from tests.conftest import parity_cases
from tests.support.reference import assert_forward_equals, call, recipe_model

CASES = parity_cases("forward_*res*.npz")  # including wide_resnet and resnext


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_forward_equals_the_reference(path: Path) -> None:
    assert_forward_equals(path, tolerance=2e-5)


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    found = call(ResNet.__call__, recipe_model("resnet18"), images)
    assert (found.shape, found.dtype) == ((2, 512), np.float32)
    assert np.isfinite(found).all()


def test_a_bottleneck_has_stride_and_groups_in_its_3x3_convolution() -> None:
    model = nnx.eval_shape(lambda: create_model("resnext50_32x4d"))
    block = model.stages[1][0]
    assert [layer.conv.strides for layer in block.layers] == [(1, 1), (2, 2), (1, 1)]
    assert [layer.conv.kernel.shape for layer in block.layers] == [
        (1, 1, 256, 256),
        (3, 3, 256 // 32, 256),
        (1, 1, 256, 512),
    ]
    assert block.shortcut.conv.strides == (2, 2)
    assert [stage[0].shortcut is None for stage in model.stages] == [False] * 4
    assert all(block.shortcut is None for stage in model.stages for block in stage[1:])
    assert nnx.eval_shape(lambda: create_model("resnet18")).stages[0][0].shortcut is None


def test_initial_weights() -> None:
    params, stats = jax.jit(lambda: split(create_model("resnet18"))[1:])()
    flat = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    for path, array in flat:
        name = jax.tree_util.keystr(path)
        if array.ndim == 4:  # Kaiming's normal initializer, by the fan-out
            expected = np.sqrt(2 / (array.shape[0] * array.shape[1] * array.shape[3]))
            assert abs(array.std() / expected - 1) < 0.05, name
            assert np.abs(array).max() > 3 * expected, f"{name} is truncated"
        else:
            assert (array == ("scale" in name)).all(), name
    assert {float(array.mean()) for array in jax.tree.leaves(stats)} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 2}, "groups=2, width_per_group=64: without bottlenecks these must be 1"),
        ({"width_per_group": 128}, "width_per_group=128: .* set bottleneck=True"),
        ({"depths": (1, 1, 1)}, r"depths=\(1, 1, 1\) must be four whole numbers of at least 1"),
        ({"depths": (1, 0, 1, 1)}, r"depths=\(1, 0, 1, 1\) must be"),
        ({"in_channels": 0}, "in_channels=0 must be a whole number of at least 1"),
        ({"remat": "some"}, "remat='some' is unknown: choose one of none, dots, full"),
    ],
    ids=str,
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ResNet(rngs=nnx.Rngs(0), **{"depths": (1, 1, 1, 1), "bottleneck": False} | settings)


@pytest.mark.parametrize("shape", [(1, 16, 16, 1), (1, 16, 0, 3), (16, 16, 3), (0, 16, 16, 3)])
def test_images_of_the_wrong_shape_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"takes \[B, H, W, 3\] .* at least 1 \(one pixel\)"):
        recipe_model("resnet18")(jnp.zeros(shape))
