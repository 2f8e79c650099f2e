"""The training of linear classifiers, step by step."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.evaluate.classification import linear_training
from dino_jax.evaluate.features.extractor import Extractor
from dino_jax.evaluate.features.tokens import ClassTokens
from dino_jax.jobs.linear import linear
from tests.support.linear_setup import OPTIONS, RATES, TEST, TRAIN


def test_every_step_has_its_rates_and_every_image_and_epoch_its_crop(weights: str) -> None:
    """The classifiers move by the logged rates, and each image has its own crop."""
    extractor = Extractor(weights, OPTIONS)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Seen:
        def __call__(self, model: Any, images: jax.Array) -> jax.Array:
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), images, ordered=False)
            return images.reshape(len(images), -1)[:, :48]

    step = linear_training.compile_probe_step(extractor, Seen(), seed=0)
    canvas = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    batch = {"canvas": np.repeat(canvas, 8, axis=0), "size": np.full((8, 2), 32, np.int32)}
    batch |= {"index": np.arange(8, dtype=np.int32), "label": np.zeros(8, np.int32)}
    start = linear_training.new_probe(jax.random.key(0), 2, 48, 10)
    moved = []
    for epoch, rates in ((0, (0.1, 0.2)), (0, (0.2, 0.1)), (1, (0.1, 0.2))):
        probe = jax.tree.map(jnp.copy, start)
        probe, _ = step(*extractor.weights, probe, batch, epoch, np.float32(rates))
        moved.append(np.asarray(probe.heads.bias))
    jax.effects_barrier()
    first, again, later = seen
    assert len(np.unique(first.reshape(8, -1), axis=0)) == 8
    np.testing.assert_array_equal(again, first)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(first, later, strict=True))
    np.testing.assert_allclose(moved[1][0], 2 * moved[0][0], rtol=1e-5)
    np.testing.assert_allclose(2 * moved[1][1], moved[0][1], rtol=1e-5)


def test_loss_that_is_not_finite_stops_the_training(weights: str, tmp_path: Path) -> None:
    def broken(probe: Any, features: Any, labels: Any, rates: jax.Array) -> Any:
        return probe, jnp.where(rates > 0.01, jnp.nan, 1.0)

    with (
        mock.patch.object(linear_training, "probe_step", broken),
        pytest.raises(UsageError, match=r"rates=\(0.01, 1.0\): the loss of 1 is nan: remove that"),
    ):
        linear(weights, TEST, workdir=tmp_path, learning_rates=RATES, **TRAIN)
    assert not (tmp_path / "progress.npz").exists()


def test_hosts_share_the_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = linear_training.Protocol((0.1,), epochs=4, batch_size=8, seed=0)
    assert linear_training.restore_or_init(tmp_path, {}, protocol, 6, 3).history == []
    gathered = {"process_allgather": lambda _: np.array([2, 0])}  # the first host has two epochs
    monkeypatch.setattr(linear_training, "multihost_utils", mock.Mock(**gathered))
    with pytest.raises(UsageError, match=r"workdir=.* all hosts share: .* \[0, 2\] trained"):
        linear_training.restore_or_init(tmp_path, {}, protocol, 6, 3)


@pytest.mark.compiler
def test_step_has_no_backward_pass_through_the_backbone(weights: str) -> None:
    """The step contains no matrix product of the backbone's backward pass."""
    extractor = Extractor(weights, OPTIONS)
    step = linear_training.compile_probe_step(extractor, ClassTokens(1), seed=0)
    probe = jax.eval_shape(lambda: linear_training.new_probe(jax.random.key(0), 2, 48, 10))
    batch = {
        "canvas": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8),
        "size": jax.ShapeDtypeStruct((8, 2), np.int32),
        "index": jax.ShapeDtypeStruct((8,), np.int32),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
    }
    rates = jax.ShapeDtypeStruct((2,), np.float32)
    text = step.lower(*extractor.weights, probe, batch, 0, rates).as_text()
    forward = jax.jit(lambda x: extractor.model.get_intermediate_layers(x, 1)).lower(
        jax.ShapeDtypeStruct((8, 16, 16, 3), np.float32)
    )
    extra = text.count("dot_general") - forward.as_text().count("dot_general")
    assert extra <= 2 + 2 + 2  # crops (rows, columns, on two platforms), logits and their gradient
