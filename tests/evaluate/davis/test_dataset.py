"""The layout of the DAVIS data set, its masks, and invalid data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.dataset import (
    labels_of_patches,
    open_davis,
    palette,
    read_mask,
    write_mask,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sequences of four frames of 40x30 pixels. The second has only its first mask."""
    for name in ("ImageSets/2017", "JPEGImages/480p/dog", "JPEGImages/480p/cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("dog\ncat\n")
    (tmp_path / "JPEGImages/480p/dog/._00000.jpg").touch()  # as created by some desktops
    labels = np.zeros((30, 40), np.uint8)
    labels[5:9, 5:9], labels[20:, 30:] = 1, 3
    for name, masks in (("dog", 4), ("cat", 1)):
        (tmp_path / "Annotations/480p" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 30), (9, 40 * i, 0)).save(
                tmp_path / f"JPEGImages/480p/{name}/{i:05}.jpg"
            )
        for i in range(masks):
            write_mask(tmp_path / f"Annotations/480p/{name}/{i:05}.png", labels)
    return tmp_path


def test_sequences_in_the_order_of_the_list(folder: Path) -> None:
    dog, cat = open_davis(folder)
    assert (dog.name, cat.name) == ("dog", "cat")
    assert len(dog.frames) == len(cat.frames) == 4
    assert dog.frame_names == ("00000", "00001", "00002", "00003")
    assert dog.num_objects == 3
    assert dog.first.shape == (30, 40)
    # The first and the last frame are not scored.
    assert {i: path.name for i, path in dog.masks.items()} == {1: "00001.png", 2: "00002.png"}
    assert cat.masks == {}


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def picture(mode: str, size: tuple[int, int]) -> Callable[[Path], None]:
    path = "Annotations/480p/dog/00000.png"
    return lambda folder: Image.new(mode, size).save(folder / path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            remove("ImageSets/2017/val.txt"),
            r"val\.txt cannot be read: data must be the folder of D",
        ),
        (
            lambda f: (f / "ImageSets/2017/val.txt").write_text(" \n"),
            r"val\.txt contains no seq",
        ),
        (
            lambda f: (f / "ImageSets/2017/val.txt").write_text("dog bird"),
            r"sequence bird has no frames \*\.jpg in .*480p",
        ),
        (
            remove("Annotations/480p/cat/00000.png"),
            r"sequence cat lacks its first .*00000\.png",
        ),
        (remove("Annotations/480p/dog/00002.png"), r"dog lacks 1 of the 2 masks.*as 00002\.png"),
        (cut("JPEGImages/480p/cat/00000.jpg"), "the first frame or mask of sequence cat: "),
        (cut("Annotations/480p/dog/00000.png"), "the first frame or mask of sequence dog: "),
        (picture("RGB", (40, 30)), "contains colours instead of labels"),
        (picture("L", (30, 40)), r"00000\.png has 30x40 pixels, but its frame has 40x30"),
        (picture("L", (40, 30)), r"00000\.png contains no object"),
    ],
)
def test_rejects_invalid_data(spoil: Callable, message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        open_davis(folder)


def test_masks_keep_their_labels(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_mask(tmp_path / "mask.png", labels)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        colors = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(colors.reshape(256, 3), palette())
    found = read_mask(tmp_path / "mask.png", (8, 32))
    np.testing.assert_array_equal(found.ravel(), [*range(255), 0])  # void is background
    (tmp_path / "damaged.png").write_bytes((tmp_path / "mask.png").read_bytes()[:900])
    with pytest.raises(UnreadableImage):
        read_mask(tmp_path / "damaged.png", (8, 32))


def test_palette_of_davis() -> None:
    """The palette in DAVIS' masks differs from PASCAL VOC's from label 9 on."""
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128)}
    expected |= {5: (128, 0, 128), 7: (128, 128, 128), 8: (64, 0, 0), 9: (191, 0, 0)}
    expected |= {10: (64, 128, 0), 11: (191, 128, 0), 13: (191, 0, 128), 15: (191, 128, 128)}
    expected |= {16: (0, 64, 0), 18: (0, 191, 0), 19: (128, 191, 0), 21: (128, 64, 128)}
    expected |= {label: (label,) * 3 for label in range(22, 256)}
    assert {label: tuple(palette()[label].tolist()) for label in expected} == expected


def test_labels_of_patches() -> None:
    labels = np.zeros((6, 8), np.uint8)
    labels[:3, 4:] = 2
    shares = labels_of_patches(labels, (2, 4), 4)
    assert shares.shape == (2, 4, 4)
    np.testing.assert_array_equal(shares.argmax(-1), [[0, 0, 2, 2], [0, 0, 0, 0]])
    np.testing.assert_array_equal(shares.sum(-1), 1)


def test_masks_of_one_object_marked_with_255(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 255
    for kind, extension, name in (("JPEGImages", "jpg", "a"), ("Annotations", "png", "a")):
        folder = tmp_path / kind / "480p" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(mask).save(folder / f"{i:05}.{extension}")
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("a\n")
    (video,) = open_davis(tmp_path)
    np.testing.assert_array_equal(video.first, mask > 0)
    truth = read_mask(video.masks[1], (8, 8), is_binary=video.is_binary)
    np.testing.assert_array_equal(truth, mask > 0)
    assert "no label but 255" in caplog.text
