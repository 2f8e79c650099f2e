"""Logistic regression on all features, and few-shot."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.logistic import check_shots, few_of_each, fit_and_score
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.extractor import Extraction
from dino_jax.jobs.logistic import logistic, summary
from tests.support.class_folders import class_folders

pytest.importorskip("sklearn")
OPTIONS = Extraction(resize=16, crop=16, canvas_size=32, batch_size=40, num_threads=2)


def test_minimizes_the_penalized_loss() -> None:
    """Two classes in one dimension; the expected optimum is found by a fine grid search."""
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 8], 40)
    features = (rng.standard_normal(80) + labels / 4).astype(np.float32)[:, None]
    test = np.linspace(features.min(), features.max(), 1001, dtype=np.float32)[:, None]
    scaled = ((features - features.mean()) / features.std())[:, 0]
    sign = np.where(labels == 8, 1, -1)
    w, b = np.meshgrid(np.linspace(0, 2, 201), np.linspace(-1, 1, 201))
    losses = np.log1p(np.exp(-sign * (w[..., None] * scaled + b[..., None]))).sum(axis=-1)
    best = np.unravel_index((0.02 * losses + w**2 / 2).argmin(), w.shape)
    border = -b[best] / w[best] * features.std() + features.mean()
    expected = np.where(test[:, 0] > border, 8, 3)
    found = fit_and_score(features, labels, test, expected, c=0.02, max_iterations=100)
    assert found["top1"] > 99
    assert found["converged"]


def test_warns_if_not_converged() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((50, 8)), rng.integers(3, size=50)
    arguments = (features, labels, features, labels)
    assert not fit_and_score(*arguments, c=100.0, max_iterations=1)["converged"]


def test_draws_few_images_per_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([2, 5, 9], [300, 60, 7]))
    for shot, counts in {"5": (5, 5, 5), "10%": (30, 6, 1), "1%": (3, 1, 1)}.items():
        rows = few_of_each(labels, shot, seed=1)
        assert tuple((labels[rows] == label).sum() for label in (2, 5, 9)) == counts
        assert (np.diff(rows) > 0).all()  # ascending, without duplicates
        np.testing.assert_array_equal(rows, few_of_each(labels, shot, seed=1))
        assert not np.array_equal(rows, few_of_each(labels, shot, seed=2))
    assert len(few_of_each(labels, "all", seed=0)) == 367
    with pytest.raises(UsageError, match="shots='8': class 9 has only 7 training images"):
        few_of_each(labels, "8", seed=0)


@pytest.mark.parametrize("shot", ["0", "0%", "101%", "some", "-3", "1.5"])
def test_rejects_impossible_shots(shot: str) -> None:
    check_shots(("all", "1%", "12.5%", "100%", "5"))
    with pytest.raises(UsageError, match=f"shots='{shot}' must be all, a number of images"):
        check_shots(("5", shot))


def test_mean_and_deviation_over_seeds() -> None:
    fits = [{"top1": top1, "converged": top1 < 60} for top1 in (50.0, 52.0, 60.0)]
    found = summary(fits)
    assert found["top1"] == pytest.approx(54)
    assert found["std"] == pytest.approx(np.sqrt((16 + 4 + 36) / 2))
    assert not found["converged"]
    assert summary(fits[:1])["std"] == 0


def test_job(goldens: Path, tmp_path: Path) -> None:
    """The accuracy is far above chance (10 %), and increases with the number of images."""
    arguments = {
        "weights": str(goldens / "pth/backbone.pth"),
        "train": "shapes:400@train",
        "test": "shapes:200@test",
        "c": 0.01,
        "options": OPTIONS,
        "cache": FeatureCache(save_features=tmp_path / "features"),
        "output": tmp_path / "results.json",
    }
    found = logistic(**arguments, shots=("all", "1%", "5"), num_seeds=3)
    assert found["all"]["images"] == 400
    assert len(found["5"]["top1_by_seed"]) == 3
    assert found["5"]["images"] == 50
    assert found["all"]["top1"] > 15
    assert found["all"]["top1"] > found["1%"]["top1"]
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["metrics"]["logistic"] == found
    assert result["settings"]["num_seeds"] == 3


def test_classes_are_matched_by_name(goldens: Path, tmp_path: Path) -> None:
    """The test images lack class a, so b and c have different numbers there."""
    bank = class_folders(tmp_path / "bank", "abc")
    queries = class_folders(tmp_path / "queries", "bc")
    arguments = {"options": OPTIONS, "output": tmp_path / "r.json"}
    found = logistic(str(goldens / "pth/backbone.pth"), bank, queries, **arguments)
    assert found["all"]["top1"] == 100
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics["classes_without_test_images"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": 0.0}, "c=0.0 .*must be above 0"),
        ({"num_seeds": 0}, "num_seeds=0"),
        ({"shots": ("x",)}, "shots='x' must be"),
        ({"c": float("nan")}, "c=nan .*must be above 0"),
        (
            {"train": "shapes:1", "test": "shapes:1"},
            "train=shapes:1: all images belong to a single class",
        ),
        ({"shots": ("1", "3")}, "train=shapes:20@train: shots=.3.: class circle has only 2"),
    ],
)
def test_rejects_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"train": "shapes:20@train", "test": "shapes:8@test", "options": OPTIONS}
    arguments |= {"weights": "/nowhere", "output": tmp_path / "r.json"}  # rejected before loading
    with pytest.raises(UsageError, match=message):
        logistic(**(arguments | changes))


def test_rejects_classes_without_readable_images(goldens: Path, tmp_path: Path) -> None:
    """One class has too few readable images for few-shot, then no class has any."""
    for i in range(8):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(path)
    arguments = {"train": str(tmp_path / "images"), "test": str(tmp_path / "images")}
    arguments |= {"weights": str(goldens / "pth/backbone.pth"), "output": tmp_path / "r.json"}
    arguments |= {"options": OPTIONS, "shots": ("4",)}
    for broken, message in (
        ("b/1.png", "shots='4': class b has only 3 training images"),
        ("b/*.png", "readable images of train=.*images: all images belong to a single class"),
    ):
        for path in (tmp_path / "images").glob(broken):
            path.write_text("no picture")
        with pytest.raises(UsageError, match=message):
            logistic(**arguments)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        logistic("w", "a", "b")
