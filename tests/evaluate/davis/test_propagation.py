"""Label propagation, compared with recorded results, a NumPy version and known motion."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.propagation import (
    FramePatches,
    Memory,
    Propagation,
    follow,
    initial_memory,
    label_map,
    network_size,
    propagate,
)
from dino_jax.evaluate.features.tokens import unit_rows
from tests.conftest import parity_cases


def run(target: np.ndarray, memory: Memory, settings: Propagation) -> np.ndarray:
    return np.asarray(jax.jit(partial(propagate, settings=settings))(target, memory))


@pytest.mark.parametrize("path", parity_cases("davis_propagation*.npz"), ids=lambda p: p.stem)
def test_equals_the_reference(path: Path) -> None:
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    grid = meta["h"], meta["w"]
    features = unit_rows(
        jnp.asarray(golden["context"].reshape(-1, *grid, golden["target"].shape[1]))
    )
    labels = jnp.moveaxis(jnp.asarray(golden["context_segs"]), 1, -1)
    settings = Propagation(
        radius=meta["radius"], top_k=meta["topk"], temperature=meta["temperature"]
    )
    found = run(
        unit_rows(jnp.asarray(golden["target"].reshape(*grid, -1))),
        Memory(features, labels, jnp.ones(len(features), bool)),
        settings,
    )
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), golden["seg"], rtol=0, atol=1e-5)


def plain(target: np.ndarray, memory: Memory, settings: Propagation) -> np.ndarray:
    """The NumPy version: computes all similarities, one patch at a time."""
    height, width, _ = target.shape
    out = np.zeros((height, width, memory.labels.shape[-1]))
    frames = np.flatnonzero(memory.is_filled)
    for y in range(height):
        for x in range(width):
            found = []
            for f in frames:
                for v in range(max(0, y - settings.radius), min(height, y + settings.radius + 1)):
                    for u in range(
                        max(0, x - settings.radius), min(width, x + settings.radius + 1)
                    ):
                        cosine = float(memory.features[f, v, u] @ target[y, x])
                        found.append((cosine, memory.labels[f, v, u]))
            found = sorted(found, key=lambda pair: -pair[0])[: settings.top_k]
            weights = np.exp(np.array([cosine for cosine, _ in found]) / settings.temperature)
            out[y, x] = weights @ np.array([label for _, label in found]) / weights.sum()
    return out


@pytest.mark.parametrize(
    ("grid", "radius", "top_k"), [((5, 7), 2, 3), ((3, 9), 12, 5), ((6, 2), 1, 99)]
)
def test_equals_the_numpy_version(grid: tuple[int, int], radius: int, top_k: int) -> None:
    """Windows are smaller and larger than the frame; an empty memory slot has no effect."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4, *grid, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    labels = rng.random((3, *grid, 3)).astype(np.float32)
    is_filled = np.array([True, False, True])
    memory = Memory(features[:3], labels, is_filled)
    settings = Propagation(radius=radius, top_k=top_k)
    np.testing.assert_allclose(
        run(features[3], memory, settings), plain(features[3], memory, settings), atol=1e-5
    )


def test_low_temperatures_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    features = unit_rows(jnp.asarray(rng.standard_normal((2, 4, 4, 8)), jnp.float32))
    labels = jnp.asarray(rng.integers(0, 2, (1, 4, 4, 2)), jnp.float32)
    memory = Memory(features[:1], labels, jnp.ones(1, bool))
    found = run(features[1], memory, Propagation(temperature=1e-3))
    nearest = run(features[1], memory, Propagation(top_k=1))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, nearest, atol=1e-2)


def test_labels_follow_moving_objects() -> None:
    """Patches with unique features move by one position per frame, and so do their labels."""
    rng = np.random.default_rng(0)
    features = np.asarray(unit_rows(jnp.asarray(rng.standard_normal((6, 12, 32)), jnp.float32)))
    labels = np.zeros((6, 12, 3), np.float32)
    labels[..., 0] = 1
    labels[1:4, 2:5], labels[4:6, 6:9] = (0, 1, 0), (0, 0, 1)
    settings = Propagation(last_frames=2, radius=2)
    step = jax.jit(partial(follow, settings=settings, patch_size=4))
    memory = initial_memory(jnp.asarray(features), labels, settings)
    for t in range(1, 4):
        memory, found = step(memory, np.roll(features, t, axis=1), 1 + (t - 1) % 2)
        expected = np.roll(labels.argmax(-1), t, axis=1)
        assert found.shape == (24, 48)
        # The center of every patch, which interpolation with neighbours does not affect.
        np.testing.assert_array_equal(np.asarray(found)[2::4, 2::4], expected)
    assert memory.is_filled.tolist() == [True, True, True]
    # Three slots: the first frame is kept; the latest frames have moved by two and three.
    np.testing.assert_array_equal(memory.features[0], features)
    np.testing.assert_array_equal(memory.features[2], np.roll(features, 2, axis=1))
    np.testing.assert_array_equal(memory.features[1], np.roll(features, 3, axis=1))


def test_memory_of_the_first_frame_only() -> None:
    features, labels = jnp.ones((2, 2, 3)) / 3**0.5, np.ones((2, 2, 1), np.float32)
    settings = Propagation(last_frames=0)
    memory, found = follow(initial_memory(features, labels, settings), features, 1, settings, 2)
    assert memory.features.shape == (1, 2, 2, 3)
    assert found.tolist() == [[0] * 4] * 4


def test_label_map_is_enlarged_as_by_torch() -> None:
    torch = pytest.importorskip("torch")
    soft = np.random.default_rng(0).random((5, 6, 4)).astype(np.float32)
    soft[..., 3] = 0  # a class without pixels
    planes = torch.nn.functional.interpolate(
        torch.from_numpy(soft).permute(2, 0, 1)[None], scale_factor=8, mode="bilinear"
    )[0].numpy()
    for plane in planes[:3]:
        plane -= plane.min()
        plane /= plane.max()
    found = np.asarray(jax.jit(partial(label_map, patch_size=8))(soft))
    assert found.dtype == np.uint8
    assert (found != planes.argmax(axis=0)).mean() < 0.001  # except for float32 ties


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ((480, 854), (480, 832)),
        ((480, 910), (480, 896)),
        ((854, 480), (832, 480)),
        ((480, 480), (480, 448)),
        ((1080, 1920), (480, 832)),
    ],
)
def test_network_size(frame: tuple[int, int], expected: tuple[int, int]) -> None:
    assert network_size(*frame, 480) == expected


class Pixels:
    """A stand-in model whose patch tokens are the pixels."""

    patch_size = 1

    def get_intermediate_layers(self, images: jax.Array, n: int) -> list[jax.Array]:
        tokens = images.reshape(len(images), -1, images.shape[-1])
        return [jnp.concatenate([tokens[:, :1], tokens], axis=1)]


def test_frames_are_resized_as_by_opencv() -> None:
    """Bilinear between pixel centers without antialiasing, rounded to whole grey levels."""
    frame = np.random.default_rng(0).integers(0, 256, (1, 6, 10, 3), np.uint8)
    feature = FramePatches((4, 5), (0.0, 0.0, 0.0), (1 / 255,) * 3)
    found = np.asarray(feature(Pixels(), jnp.asarray(frame), None))[0]
    ys, xs = (np.arange(4) + 0.5) * 1.5 - 0.5, (np.arange(5) + 0.5) * 2 - 0.5
    expected = np.zeros((4, 5, 3))
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            top, left = int(y), int(x)
            square = frame[0, top : top + 2, left : left + 2].astype(float)
            weights = np.outer([top + 1 - y, y - top], [left + 1 - x, x - left])
            expected[i, j] = np.floor((square * weights[..., None]).sum((0, 1)) + 0.5)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"last_frames": -1}, {"radius": 0}, {"top_k": 0}, {"temperature": 0.0}]
)
def test_rejects_settings_out_of_range(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(UsageError, match=f"{name}={value} must be"):
        Propagation(**change)
