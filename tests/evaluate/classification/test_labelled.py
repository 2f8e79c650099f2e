"""The classes of training and test images."""

from pathlib import Path

import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.labelled import (
    open_labelled,
    open_test,
    renumbered,
    untested_classes,
)


def folder(root: Path, names: str) -> str:
    """Creates two files per class, which are never opened."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").touch()
    return str(root)


def idx(root: Path, split: str, labels: list[int]) -> None:
    for name, array in (("images-idx3", np.zeros((len(labels), 8, 8))), ("labels-idx1", labels)):
        array = np.asarray(array)
        shape = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        (root / f"{split}-{name}-ubyte").write_bytes(shape + array.astype(np.uint8).tobytes())


def test_counts_only_classes_that_occur(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images are sorted by class, so a slice of a folder lacks some classes."""
    bank, queries = folder(tmp_path / "bank", "abc"), folder(tmp_path / "queries", "abc")
    with pytest.raises(UsageError, match=r"has classes that .*bank.0:4. lacks \(c\): use a train"):
        open_labelled(f"{bank}[0:4]", queries)
    sources = open_labelled(bank, f"{queries}[4:]")
    assert "has no images of 2 of the 3 classes" in caplog.text
    assert untested_classes(*sources) == ["a", "b"]
    few = open_labelled(f"{bank}[2:]", f"{queries}[4:6]")
    assert untested_classes(*few) == ["b"]


def test_numbered_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    idx(tmp_path, "train", [0, 1, 2, 0])
    idx(tmp_path, "t10k", [1, 3, 3])
    with pytest.raises(UsageError, match=r"@test has classes that .*@train lacks \(3\): use a"):
        open_labelled(f"idx:{tmp_path}@train", f"idx:{tmp_path}@test")
    sources = open_labelled(f"idx:{tmp_path}@train", f"idx:{tmp_path}@test[:1]")
    assert untested_classes(*sources) == [0, 2]
    assert "has no images of 2 of the 3 classes" in caplog.text


def test_labels_follow_the_names(tmp_path: Path) -> None:
    """Classes without images may be missing from the other source."""
    queries = open_test(folder(tmp_path, "bcd") + "[0:4]")
    assert renumbered(queries.labels, queries, ("a", "b", "c")).tolist() == [1, 1, 2, 2]
    np.testing.assert_array_equal(renumbered(queries.labels, queries, None), queries.labels)


def test_missing_labels_are_explained(tmp_path: Path) -> None:
    assert open_test(folder(tmp_path / "one", "a")).class_names == ("a",)  # one class is enough
    stray = Path(folder(tmp_path / "two", "ab"), "stray.png")
    stray.touch()
    with pytest.raises(UsageError, match=rf"none beside these folders, such as {stray}"):
        open_test(str(stray.parent))
