"""Features on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate import feature_store
from dino_jax.evaluate.features import Features

ABOUT = {
    "weights": 32 * "ab",
    "feature": "ClassToken()",
    "transform": {"crop": 16},
    "data": {"spec": "shapes:5", "images": 5},
}
FEATURES = Features(
    np.arange(15, dtype=np.float32).reshape(5, 3), np.arange(5), np.array([0, 1, 2, 4, 5])
)


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    store = tmp_path / "new" / "store"
    feature_store.save(store, ABOUT, Features(*(np.zeros(2) for _ in FEATURES)))
    feature_store.save(store, ABOUT, FEATURES)  # replaces it
    for found, saved in zip(feature_store.load(store, ABOUT), FEATURES, strict=True):
        np.testing.assert_array_equal(found, saved)
        assert found.dtype == saved.dtype
    assert [path.name for path in store.iterdir()] == [feature_store.entry_of(store, ABOUT).name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": 32 * "cd"},
            r"others than asked for: weights abababababab\.\.\. instead of cdcdcdcdcdcd",
        ),
        ({"transform": {"crop": 32}}, "transform crop=16 instead of crop=32"),
        ({"feature": "ClassTokens(4)"}, r"feature ClassToken\(\) instead of ClassTokens\(4\)"),
        ({"data": {"spec": "shapes:5", "images": 6}}, "images=5 instead of .*images=6"),
        ({"data": {"spec": "shapes:7", "images": 7}}, "no features of shapes:7, but of shapes:5"),
    ],
)
def test_other_features_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    feature_store.save(tmp_path, ABOUT, FEATURES)
    with pytest.raises(UsageError, match=message):
        feature_store.load(tmp_path, ABOUT | change)


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder: make them by --save-features"):
        feature_store.load(tmp_path / "nowhere", ABOUT)
    feature_store.save(tmp_path, ABOUT, FEATURES)
    file = feature_store.entry_of(tmp_path, ABOUT) / "features.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UsageError, match="are damaged: remove that folder"):
        feature_store.load(tmp_path, ABOUT)
    np.save(file, FEATURES.features[:4])
    with pytest.raises(UsageError, match="are damaged: remove that folder"):
        feature_store.load(tmp_path, ABOUT)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be saved in"):
        feature_store.save(tmp_path / "file", ABOUT, FEATURES)


def test_a_listing_is_known_by_its_names(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    before = feature_store.describe_data(open_source(str(tmp_path)))
    assert before["images"] == 2
    assert before == feature_store.describe_data(open_source(str(tmp_path)))
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert before["names"] != feature_store.describe_data(open_source(str(tmp_path)))["names"]
