"""The idx format of MNIST, intact and damaged."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_jax.data.decode import decode
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from tests.support.damage import edit


def idx_bytes(values: np.ndarray) -> bytes:
    shape = np.array(values.shape, ">u4").tobytes()
    return bytes((0, 0, 8, values.ndim)) + shape + values.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Five training images, compressed, and three test images, 4 pixels high and 6 wide."""
    rng = np.random.default_rng(0)
    for prefix, number in (("train", 5), ("t10k", 3)):
        images = rng.integers(0, 256, (number, 4, 6), np.uint8)
        for name, values in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", np.arange(number, dtype=np.uint8)),
        ):
            if prefix == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
            else:
                (tmp_path / name).write_bytes(idx_bytes(values))
    return tmp_path


def test_idx(idx_folder: Path) -> None:
    expected = np.random.default_rng(0).integers(0, 256, (5, 4, 6), np.uint8)
    source = open_source(f"idx:{idx_folder}@train")
    assert len(source) == 5
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.label(3) == 3
    for index in range(5):
        pixels = decode(source.image(index))
        np.testing.assert_array_equal(pixels, np.repeat(expected[index, ..., None], 3, axis=2))
    assert len(open_source(f"idx:{idx_folder}@test")) == 3


@pytest.mark.parametrize(
    ("split", "damage", "message"),
    [
        ("test", lambda root: (root / "t10k-labels-idx1-ubyte").unlink(), "neither t10k-labels"),
        ("test", edit("t10k-images-idx3-ubyte", lambda b: b[:-1]), "71 bytes of data, but"),
        ("test", edit("t10k-images-idx3-ubyte", lambda b: b + b"x"), "73 bytes of data, but"),
        ("test", edit("t10k-images-idx3-ubyte", lambda b: b[:9]), "is not an idx file of bytes"),
        ("test", edit("t10k-images-idx3-ubyte", lambda b: b""), "is not an idx file of bytes"),
        (
            "test",
            edit("t10k-images-idx3-ubyte", lambda b: b"\0\0\x0d" + b[3:]),
            "starts with 00000d03 instead of 00000803",
        ),
        (
            "test",
            edit("t10k-labels-idx1-ubyte", lambda b: idx_bytes(np.zeros(2, np.uint8))),
            "3 images of 4x6 pixels but 2 labels",
        ),
        ("train", edit("train-images-idx3-ubyte.gz", lambda b: b[:-12]), "cannot be read"),
        ("train", edit("train-images-idx3-ubyte.gz", lambda b: b"<html>"), "cannot be read"),
        (
            "train",
            edit("train-labels-idx1-ubyte.gz", lambda b: b[:12] + b"\xff\xff" + b[14:]),
            "cannot be read",
        ),
    ],
)
def test_damaged_idx(
    idx_folder: Path, split: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(idx_folder)
    with pytest.raises(UsageError, match=message):
        open_source(f"idx:{idx_folder}@{split}")


def test_fashion_mnist() -> None:
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    source = open_source(f"idx:{root}@test")
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert decode(source.image(9_999)).shape == (28, 28, 3)
