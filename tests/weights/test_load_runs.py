"""Loading models from run folders."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dino_jax
from dino_jax.config import build
from dino_jax.errors import UsageError
from dino_jax.models.network import split
from tests.support import runs

IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


def expected_features(which: str) -> np.ndarray:
    """Features computed from the raw arrays of the checkpoint."""
    saved = runs.arrays(runs.whole())
    model = build.model_spec(runs.tiny_config()).backbone(nnx.Rngs(0))
    graphdef, params, _ = split(model)

    def raw(path: tuple, _: jax.Array) -> np.ndarray:
        keys = "".join(f"['{part.key}']" for part in path)  # Orbax converts numbers to text
        return saved[f"{which}['params']['backbone']{keys}"]

    return np.asarray(
        nnx.merge(graphdef, jax.tree_util.tree_map_with_path(raw, params), {})(IMAGES)
    )


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_features_equal_those_of_the_checkpoint(which: str) -> None:
    model, info = dino_jax.load(runs.whole(), which=which)
    features = model(IMAGES)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected_features(which), rtol=1e-4, atol=1e-5)
    assert (info.arch, info.patch_size, info.embed_dim, info.which) == ("vit_small", 8, 16, which)
    assert info.source == f"{runs.whole()}@{runs.TOTAL_STEPS}"


def test_head_returns_logits_and_teacher_differs_from_student() -> None:
    model, head, info = dino_jax.load_with_head(runs.whole())
    assert head(model(IMAGES)).shape == (2, 32)
    _, student = dino_jax.load(runs.whole(), which="student")
    assert student.sha256 != info.sha256
    assert dino_jax.load(runs.whole())[1].sha256 == info.sha256


def test_a_step_can_be_chosen() -> None:
    first, *_, last = runs.steps(runs.whole())
    _, early = dino_jax.load(f"{runs.whole()}@{first}")
    _, late = dino_jax.load(f"{runs.whole()}@{last}")
    assert early.sha256 != late.sha256


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "/nowhere",
            r"'/nowhere' is neither a hub name \(dino_vits16, .*\) nor an existing file or",
        ),
        ("dino_vits61", "'dino_vits61' is neither a hub name"),
        ("{run}@7", "has no checkpoint of step 7: choose one of"),
        ("{run}@last", "the step after @ must be a whole number"),
    ],
)
def test_rejects_names(weights: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dino_jax.load(weights.format(run=runs.whole()))


def test_rejects_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no checkpoints"):
        dino_jax.load(tmp_path)
    with pytest.raises(UsageError, match="which='both' is unknown"):
        dino_jax.load(runs.whole(), which="both")
