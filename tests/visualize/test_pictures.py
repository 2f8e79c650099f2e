"""Which pictures are drawn, under which names, and how they are resized."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dino_jax import create_model, memory
from dino_jax.errors import UsageError
from dino_jax.visualize import pictures as pictures_module
from dino_jax.visualize.pictures import (
    Pictures,
    check_memory,
    check_size,
    fit,
    open_pictures,
    resized_shape,
)


def save(path: Path, size: tuple[int, int] = (20, 10)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path)
    return str(path)


def test_files_folders_and_sources_in_order(tmp_path: Path) -> None:
    first = save(tmp_path / "a picture, here.png")
    save(tmp_path / "folder" / "x" / "1.png", (5, 6))
    save(tmp_path / "folder" / "y" / "1.jpg", (7, 8))
    names = [first, str(tmp_path / "folder"), first, "shapes:2@test"]
    pictures = Pictures(open_pictures(names), channels=3)
    assert len(pictures) == 6
    read = dict(pictures)
    assert list(read) == [
        "a_picture_here",
        "1",
        "1_2",
        "a_picture_here_2",
        "picture_0",
        "picture_1",
    ]
    assert [p.shape for p in read.values()][:3] == [(10, 20, 3), (6, 5, 3), (8, 7, 3)]
    assert list(dict(pictures)) == list(read)  # once more from the start


def test_one_bad_image_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_text("no picture")
    pictures = Pictures(open_pictures([str(bad), good]), channels=1)
    ((name, pixels),) = pictures
    assert (name, pixels.shape, pictures.unreadable) == ("good", (10, 20, 1), [str(bad)])
    assert f"unreadable image {bad}" in caplog.text
    for i in range(20):  # these jobs have no bound, nor an option for one
        (tmp_path / f"{i}.png").write_text("no picture")
    pictures = Pictures(open_pictures([str(tmp_path)]), channels=1)
    assert [name for name, _ in pictures] == ["good"]
    assert len(pictures.unreadable) == 21
    with pytest.raises(UsageError, match=r"no image of .*bad.png can be read; the warnings above"):
        list(Pictures(open_pictures([str(bad)]), channels=3))


def test_refuses_what_does_not_exist() -> None:
    with pytest.raises(UsageError, match="/no/where is not a folder"):
        open_pictures(["/no/where"])
    with pytest.raises(UsageError, match=r"there is no image /no/where\.jpg: check the path"):
        open_pictures(["/no/where.jpg"])
    with pytest.raises(UsageError, match="no image was given"):
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
    check_size(size, 8)
    pixels = np.zeros((10, 20, 3), np.uint8)
    assert resized_shape((10, 20), size, 8) == resized
    assert fit(pixels, size, 8).shape == (*fitted, 3)
    assert fit(pixels[..., :1], size, 8).shape == (*fitted, 1)


def test_thin_pictures_get_a_row_of_patches() -> None:
    assert fit(np.zeros((2, 90, 3), np.uint8), (0,), 16).shape == (16, 80, 3)


@pytest.mark.parametrize("size", [(4,), (0, 0), (-1,), (9, 9, 9), ()])
def test_refuses_sizes(size: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"size=.*: give height and width, or .* at least 8 pixels"
    ):
        check_size(size, 8)


def test_refuses_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """250 x 187 patches; 6 heads of float32. An XCiT has no such matrix."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 48 << 30)
    vit, xcit = (
        nnx.eval_shape(lambda name=name: create_model(name, rngs=nnx.Rngs(0)))
        for name in ("vit_small", "xcit_small_12_p16")
    )
    photo = np.zeros((2992, 4000, 3), np.uint8)
    said = (
        r"4000x2992 pixels are 46751 tokens, whose attention to each other takes 48\.85 GiB of "
        r"memory, and there are 48\.00 GiB: give a smaller --size, such as --size 480 for"
    )
    with pytest.raises(UsageError, match=said):
        check_memory(photo, vit)
    check_memory(photo, xcit)
    check_memory(photo[:2960], vit)
    monkeypatch.setattr(pictures_module, "device_limit", lambda _: 47 << 30)  # a GPU says its own
    with pytest.raises(UsageError, match=r"there are 47\.00 GiB"):
        check_memory(photo[:2960], vit)


def test_resizes_bilinear_with_antialiasing_and_cuts_right_and_bottom() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    whole = Image.fromarray(pixels).resize((29, 27), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(fit(pixels, (27, 29), 8), np.asarray(whole)[:24, :24])
    mask = (pixels[..., :1] > 128).astype(np.uint8)
    assert set(np.unique(fit(mask, (27, 29), 8, Image.Resampling.NEAREST))) == {0, 1}
