"""Folders with files of any kind: what is read, skipped and reported."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import EXTENSIONS, UnreadableImage, decode, open_image
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import open_source
from dino_jax.data.sources.folder import check_apart
from dino_jax.errors import UsageError


def add(path: Path, format_: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 9).save(path, format_)


def names(spec: object) -> list[str]:
    source = open_source(str(spec))
    return [os.path.relpath(source.name(i), str(spec)) for i in range(len(source))]


def test_every_extension_is_read(tmp_path: Path) -> None:
    for extension in EXTENSIONS:
        add(tmp_path / f"{extension[1:]}{extension}")
        add(tmp_path / f"{extension[1:]}-upper{extension.upper()}")
    assert len(names(tmp_path)) == 2 * len(EXTENSIONS)


@pytest.mark.parametrize("format_", ["PPM", "TGA", "ICO", "GIF", "DIB", "JPEG2000", "TIFF"])
def test_every_format_is_decoded(tmp_path: Path, format_: str) -> None:
    add(tmp_path / "x.jpg", format_)
    assert decode(open_image(tmp_path / "x.jpg")).shape[2] == 3


def test_a_format_that_starts_programs_is_not_opened(tmp_path: Path) -> None:
    add(tmp_path / "x.jpg", "EPS")
    with pytest.raises(UnreadableImage, match="not in an image format"):
        open_image(tmp_path / "x.jpg")


def test_other_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "._a.png", "@eaDir/a.png", "__MACOSX/b.png", "$RECYCLE.BIN/c.png"):
        add(tmp_path / name)
    for name in ("a.txt", "b.TXT", "c.mp4", "README", "Thumbs.db"):
        (tmp_path / name).write_text("no image")
    assert names(tmp_path) == ["a.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: files skipped, as they are not images: 2 .txt, 1 .mp4, 1 without extension"
    ]


def test_unreadable_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path / "a" / "1.png")
    add(tmp_path / "b" / "1.png")
    real, error = os.scandir, PermissionError(13, "Permission denied")

    def scandir(path: str) -> object:
        if str(path).rstrip("/").endswith("/b"):
            raise error
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(tmp_path) == ["a/1.png"]
    assert f"skipped 1 folders that cannot be listed: {tmp_path}/b (Permission" in caplog.text
    with pytest.raises(UsageError, match="cannot list the folder"):
        open_source(str(tmp_path / "b"))
    error = OSError(5, "Input/output error")  # must not change the data set
    with pytest.raises(UsageError, match=r"cannot list the folder .*/b: Input/output error"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("mark", ["checkpoints/ .lock", "checkpoints/ log.txt", "results.json"])
def test_results_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture, mark: str) -> None:
    add(tmp_path / "cat" / "1.png")
    add(tmp_path / "run" / "learning_curve.png")
    for name in mark.split():
        path = tmp_path / "run" / name
        path.mkdir() if name.endswith("/") else path.write_text('{\n  "job": "attention"}')
    assert names(tmp_path) == ["cat/1.png"]
    assert f"skipped the results of a run or job in {tmp_path}/run" in caplog.text


def test_pipes_and_sockets_are_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "c.jpg"))
    add(tmp_path / "d.png")
    source = open_source(str(tmp_path))
    for i in range(3):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            source.image(i)
        with pytest.raises(UnreadableImage, match="not a regular file"):
            source.encoded(i)
    assert Records(source).read_or_next(0, decode)[1] == 3


def test_a_folder_that_looks_like_a_slice(tmp_path: Path) -> None:
    album = tmp_path / "album[1:10]"
    for name in ("train/1.png", "train/2.png", "3.png"):
        add(album / name)
    for spec, count in (("", 3), ("@train", 2), ("[0:2]", 2), ("@train[1:]", 1)):
        for kind in ("", "folder:"):
            assert len(open_source(f"{kind}{album}{spec}")) == count


def test_spellings_of_one_class(tmp_path: Path) -> None:
    add(tmp_path / "cafe\u0301" / "1.png")
    add(tmp_path / "caf\xe9" / "2.png")
    source = open_source(str(tmp_path))
    assert source.class_names == ("caf\xe9",)
    assert source.labels.tolist() == [0, 0]


def test_dark_16_bit_images_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / f"{i}.png")
    records = Records(open_source(str(tmp_path)))
    assert [records.read(i, decode).max() for i in range(3)] == [15, 15, 15]
    assert caplog.text.count("no value above 4000") == 1


def test_max_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path / "1.png")
    source = open_source(str(tmp_path))
    assert Records(source, max_pixels=64).read(0, decode) is not None
    assert Records(source, max_pixels=63).read(0, decode) is None
    assert "8x8 is 64 pixels, more than max_pixels=63: shrink the image, or raise" in caplog.text


def test_outputs_are_kept_apart_from_images(tmp_path: Path) -> None:
    add(tmp_path / "data" / "cat" / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "cat")
    source = open_source(str(tmp_path / "data"))
    for folder in ("data", "data/cat", "link", "data/../data/cat"):
        with pytest.raises(UsageError, match=r"workdir=.* contains images of .*: choose"):
            check_apart(source, tmp_path / folder, "workdir")
    for folder in ("data/run", "elsewhere", "data/cat/run", "."):
        check_apart(source, tmp_path / folder, "workdir")
    with pytest.raises(UsageError, match="contains images"):
        check_apart(open_source(f"{tmp_path}/data[0:1]"), tmp_path / "data", "output")
    check_apart(open_source("shapes:2@test"), tmp_path, "workdir")
