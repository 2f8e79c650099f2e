"""Folder sources: which image files are found, in which order, and their classes."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode
from dino_jax.data.sources import folder, open_source
from dino_jax.errors import UsageError


def add_image(path: Path, color: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}
    suffix = path.suffix.lower()
    Image.new("L", (4, 3), color).save(path, kinds.get(suffix, suffix[1:].upper()))


def names(spec: str) -> list[str]:
    source = open_source(spec)
    return [source.name(i) for i in range(len(source))]


def test_folder_finds_images_of_all_kinds_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.PNG", "c.jpg", "d/e.jpeg", "d/f/g.TIF", "d/f/h.tiff", "d/i.WebP", "j/k.bmp"):
        add_image(tmp_path / name)
    for name in (".hidden.png", ".cache/l.png", "folder.png/m.png"):
        add_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "png").write_text("no image")
    found = [os.path.relpath(name, tmp_path) for name in names(f"folder:{tmp_path}")]
    # a folder's own files come before those of its sub-folders
    wanted = ["b.PNG", "c.jpg", "d/e.jpeg", "d/i.WebP", "d/f/g.TIF", "d/f/h.tiff"]
    wanted += ["folder.png/m.png", "j/k.bmp"]
    assert found == wanted
    assert names(str(tmp_path)) == names(f"folder:{tmp_path}")
    source = open_source(str(tmp_path))
    assert [decode(source.image(i)).shape for i in range(len(source))] == [(3, 4, 3)] * 8


def test_folder_order_is_sorted_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.png", "b/1.png", "a/9.png", "a-/3.png", "0.png", "z.png"):
        add_image(tmp_path / name)
    expected = ["0.png", "z.png", "a/9.png", "a-/3.png", "b/1.png", "b/2.png"]
    expected = [str(tmp_path / name) for name in expected]
    assert names(str(tmp_path)) == expected

    class Reversed:
        def __init__(self, path: str) -> None:
            with real(path) as scan:
                self.entries = sorted(scan, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    real = os.scandir
    monkeypatch.setattr(os, "scandir", Reversed)
    assert names(str(tmp_path)) == expected


def test_folder_classes_are_the_first_level(tmp_path: Path) -> None:
    for name in ("dog/1.png", "dog/young/2.png", "cat/3.png"):
        add_image(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.labels.dtype == np.int32
    by_name = {Path(source.name(i)).name: source.label(i) for i in range(len(source))}
    assert by_name == {"1.png": 1, "2.png": 1, "3.png": 0}
    assert [source.label(i) for i in range(len(source))] == source.labels.tolist()


def test_one_folder_is_one_class(tmp_path: Path) -> None:
    add_image(tmp_path / "cat/young/1.png")
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat",)
    assert source.labels.tolist() == [0]


@pytest.mark.parametrize("files", [("a/1.png", "b/2.png", "3.png"), ("1.png",)])
def test_folder_without_classes(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        add_image(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert source.class_names is None
    assert source.label(0) == -1


def test_folder_split_is_a_sub_folder(tmp_path: Path) -> None:
    for name in ("train/1.png", "train/2.png", "val/3.png"):
        add_image(tmp_path / name)
    source = open_source(f"folder:{tmp_path}@val")
    assert names(source.spec) == [str(tmp_path / "val" / "3.png")]
    with pytest.raises(UsageError, match=r"no sub-folder 'test'; available .*: train, val"):
        open_source(f"{tmp_path}@test")


def test_an_existing_path_takes_precedence_over_split_and_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    add_image(Path("me@home/1.png"))
    add_image(Path("me@home/train/2.png"))
    add_image(Path("shapes:5/3.png"))
    assert names("me@home") == ["me@home/1.png", "me@home/train/2.png"]
    assert names("folder:me@home@train") == ["me@home/train/2.png"]
    assert names("shapes:5") == ["shapes:5/3.png"]


def test_folder_follows_links_but_not_in_cycles(tmp_path: Path) -> None:
    add_image(tmp_path / "elsewhere" / "1.png")
    add_image(tmp_path / "data" / "a" / "2.png")
    for name, target in {
        "b": "../elsewhere",  # two links to the same folder are not a cycle
        "c": "../elsewhere",
        "up": "..",
        "here": ".",
        "itself": "itself",
        "nowhere": "gone",
        "2.png": "a/2.png",
        "gone.png": "gone",
    }.items():
        (tmp_path / "data" / name).symlink_to(target)
    found = [os.path.relpath(name, tmp_path / "data") for name in names(str(tmp_path / "data"))]
    direct = ["2.png", "gone.png", "a/2.png", "b/1.png", "c/1.png"]
    assert found[: len(direct)] == direct
    assert found[len(direct) :] == ["up/elsewhere/1.png"]
    with pytest.raises(UnreadableImage):
        open_source(str(tmp_path / "data")).image(1)


@pytest.mark.parametrize("files", [(), ("readme.txt",), ("a/b/readme.txt", ".x.png")])
def test_folder_without_images(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(UsageError, match=r"no images in .* must end in \.jpg"):
        open_source(str(tmp_path))


def test_folder_supports_unusual_names(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \xf0\x9f\x98\x80.png")  # not valid UTF-8
    add_image(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / odd)
    add_image(tmp_path / "Ünï.png")
    assert set(names(str(tmp_path))) == {str(tmp_path / odd), str(tmp_path / "Ünï.png")}
    source = open_source(str(tmp_path))
    assert [decode(source.image(i)).shape for i in range(2)] == [(3, 4, 3)] * 2


def test_a_listing_takes_little_more_memory_than_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, length = 50_000, len("class7/image_00000000.jpg")
    paths = (f"class{i % 10}/image_{i:08}.jpg" for i in range(count))
    monkeypatch.setattr(folder, "image_paths", lambda root: paths)
    tracemalloc.start()
    try:
        source = open_source(str(tmp_path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(source), source.label(count - 1)) == (count, 9)
    assert source.name(count - 1) == str(tmp_path / f"class9/image_{count - 1:08}.jpg")
    assert peak < 2 * count * (length + 8 + 4)  # name, end and class; twice that while growing


def test_folder_calls_stat_for_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        add_image(tmp_path / "a" / f"{number}.png")
    asked = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kw: asked.append(str(path)) or real(path, **kw))
    assert len(open_source(f"folder:{tmp_path}")) == 50
    assert not [path for path in asked if path.endswith(".png")]
