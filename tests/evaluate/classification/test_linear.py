"""Linear classifiers, compared with recorded results of the reference and a NumPy formula."""

import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.evaluate.classification import linear
from dino_jax.evaluate.classification.linear import (
    Heads,
    Probe,
    learning_rates,
    new_probe,
    probe_step,
    score_heads,
)
from tests.conftest import parity_cases


@pytest.mark.parametrize("path", parity_cases("linear*.npz"), ids=lambda p: p.stem)
def test_equals_the_reference(path: Path) -> None:
    """Compares weights, losses, accuracies and rates; training a second rate changes nothing."""
    step = jax.jit(probe_step)
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    features, labels = golden["features"], golden["labels"].astype(np.int32)
    train, batch = meta["n_train"], meta["batch"]
    base = (0.5, meta["base_lr"])
    kernel = jnp.tile(golden["weight0"].T, (2, 1, 1))
    heads = Heads(kernel, jnp.zeros((2, kernel.shape[2])))
    probe = Probe(heads, jax.tree.map(jnp.zeros_like, heads))
    for epoch in range(meta["epochs"]):
        rates = learning_rates(base, batch_size=batch, epoch=epoch, epochs=meta["epochs"])
        np.testing.assert_allclose(rates[1], golden["epoch_lr"][epoch], rtol=1e-6)
        losses = []
        for start in range(0, train, batch):
            block = slice(start, start + batch)
            probe, loss = step(probe, features[block], labels[block], rates)
            losses.append(loss)
        np.testing.assert_allclose(np.mean(losses, axis=0)[1], golden["losses"][epoch], rtol=1e-5)
        found = score_heads(probe.heads, features[train:], labels[train:])
        top1, top5 = golden["acc1_acc5"][epoch]
        assert (found["top1"][1], found["top5"][1]) == pytest.approx((top1, top5))
    np.testing.assert_allclose(probe.heads.kernel[1].T, golden["weight"], atol=1e-5)
    np.testing.assert_allclose(probe.heads.bias[1], golden["bias"], atol=1e-5)
    assert np.abs(probe.heads.kernel[0].T - golden["weight"]).max() > 0.1


def test_initial_probe_is_small_and_equal_for_all_rates() -> None:
    probe = new_probe(jax.random.key(0), 3, 400, 50)
    assert probe.heads.kernel.shape == (3, 400, 50)
    assert 0.0095 < float(probe.heads.kernel.std()) < 0.0105
    np.testing.assert_array_equal(probe.heads.kernel[0], probe.heads.kernel[2])
    assert not np.any(probe.heads.bias)
    assert not np.any(probe.momentum.kernel)


@pytest.mark.parametrize("num_classes", [2, 5, 30])
def test_scores_in_blocks(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with NumPy, for any number of classes and any block size."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((2, 6, num_classes)).astype(np.float32)
    bias = rng.standard_normal((2, num_classes)).astype(np.float32)
    features = rng.standard_normal((50, 6)).astype(np.float32)
    labels = rng.integers(num_classes, size=50).astype(np.int32)
    heads = Heads(jnp.asarray(kernel), jnp.asarray(bias))
    monkeypatch.setattr(linear, "BLOCK_BYTES", (8 * 2 * num_classes + 4 * 6) * 17)
    with mock.patch.object(linear, "_score_block", wraps=linear._score_block) as blocks:
        found = score_heads(heads, features, labels)
    assert [call.args[1].shape for call in blocks.call_args_list] == [(17, 6), (17, 6), (16, 6)]
    for i in range(2):
        logits = features @ kernel[i] + bias[i]
        order = np.argsort(-logits, axis=1)
        hits = order == labels[:, None]
        assert found["top1"][i] == pytest.approx(100 * hits[:, 0].mean())
        assert found["top5"][i] == pytest.approx(100 * hits[:, :5].any(axis=1).mean())
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert found["loss"][i] == pytest.approx(-logs[np.arange(50), labels].mean(), rel=1e-5)
