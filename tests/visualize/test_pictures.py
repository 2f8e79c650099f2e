"""Opening, naming and resizing the pictures to draw."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import decode
from dino_jax.errors import UsageError
from dino_jax.visualize.pictures import (
    check_input_size,
    fit_to_patches,
    open_pictures,
    patch_grid_shape,
    resized_shape,
)


def save(path: Path, size: tuple[int, int] = (20, 10)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path)
    return str(path)


def test_files_folders_and_sources_keep_their_order(tmp_path: Path) -> None:
    first = save(tmp_path / "a picture, here.png")
    save(tmp_path / "folder" / "x" / "1.png", (5, 6))
    save(tmp_path / "folder" / "y" / "1.jpg", (7, 8))
    pictures = open_pictures([first, str(tmp_path / "folder"), first, "shapes:2@test"])
    assert pictures.stems() == [
        "a_picture_here",
        "1",
        "1_2",
        "a_picture_here_2",
        "picture_0",
        "picture_1",
    ]
    assert [decode(pictures.image(i)).shape[:2] for i in range(3)] == [(10, 20), (6, 5), (8, 7)]
    assert [pictures.name(i) for i in (3, 5)] == [first, "shapes:2@test picture 1"]
    assert len({pictures.stamp(i) for i in range(6)}) == 5


def test_files_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = save(tmp_path / "1.png"), save(tmp_path / "more" / "2.png")
    pictures = open_pictures(["~/1.png", "~/more", "folder:~/more"])
    assert [pictures.name(i) for i in range(len(pictures))] == [first, second, second]
    with pytest.raises(UsageError, match=r"image file ~nobody_here/1\.png does not exist: check"):
        open_pictures(["~nobody_here/1.png"])


def test_rejects_missing_paths() -> None:
    with pytest.raises(UsageError, match="/no/where is not a folder"):
        open_pictures(["/no/where"])
    with pytest.raises(UsageError, match=r"image file /no/where\.jpg does not exist: check"):
        open_pictures(["/no/where.jpg"])
    with pytest.raises(UsageError, match="no images given"):
        open_pictures([])


@pytest.mark.parametrize(
    ("size", "resized", "fitted"),
    [
        ((48, 64), (48, 64), (48, 64)),
        ((50, 31), (50, 31), (48, 24)),
        ((20,), (20, 40), (16, 40)),
        ((0,), (10, 20), (8, 16)),
    ],
)
def test_sizes(size: tuple[int, ...], resized: tuple[int, int], fitted: tuple[int, int]) -> None:
    check_input_size(size, 8)
    pixels = np.zeros((10, 20, 3), np.uint8)
    assert resized_shape((10, 20), size, 8) == resized
    assert patch_grid_shape((10, 20), size, 8) == fitted
    assert fit_to_patches(pixels, size, 8).shape == (*fitted, 3)
    assert fit_to_patches(pixels[..., :1], size, 8).shape == (*fitted, 1)


def test_thin_pictures_get_a_row_of_patches() -> None:
    assert fit_to_patches(np.zeros((2, 90, 3), np.uint8), (0,), 16).shape == (16, 80, 3)


@pytest.mark.parametrize("size", [(4,), (0, 0), (-1,), (9, 9, 9), ()])
def test_rejects_sizes(size: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"size=.*: give height and width, or .* at least 8 pixels"
    ):
        check_input_size(size, 8)


def test_resizes_with_antialiasing_and_crops_right_and_bottom() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    whole = Image.fromarray(pixels).resize((29, 27), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(fit_to_patches(pixels, (27, 29), 8), np.asarray(whole)[:24, :24])
    mask = (pixels[..., :1] > 128).astype(np.uint8)
    assert set(np.unique(fit_to_patches(mask, (27, 29), 8, Image.Resampling.NEAREST))) == {0, 1}


def test_long_names_give_different_file_stems(tmp_path: Path) -> None:
    paths = [tmp_path / f"{'x' * 240}{end}.png" for end in "ab"]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    stems = open_pictures([str(path) for path in paths]).stems()
    assert len(set(stems)) == 2
    assert max(map(len, stems)) <= 200
