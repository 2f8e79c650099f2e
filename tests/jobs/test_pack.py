"""A packed source reads like the original; an incomplete or damaged one is rejected."""

import itertools
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dino_jax import cli
from dino_jax.data.decode import UnreadableImage, decode
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.sources import EncodedSource, open_source
from dino_jax.data.sources.folder import FolderSource
from dino_jax.errors import UsageError
from dino_jax.jobs.pack import pack
from tests.support.damage import edit

NUMBER = 30  # images in the folder
NO_IMAGE, GONE = 4, 5  # indices of an HTML page and of a broken link


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of JPEG and PNG files; one is not an image, one missing, one oddly named."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for i in range(NUMBER):
        kind = ("jpg", "png")[i % 2]
        path = root / ("bee" if i < NUMBER // 2 else "ant") / f"{i:02}.{kind}"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (200 + i, 250, 3)[: 3 - (i % 5 == 0)], np.uint8)
        Image.fromarray(pixels).save(path)
    files = sorted((root / "ant").iterdir())
    files[NO_IMAGE].write_text("<!DOCTYPE html><title>404</title>")
    files[GONE].unlink()
    files[GONE].symlink_to("nowhere")
    files[0].rename(root / "ant" / os.fsdecode(b"00 caf\xe9.jpg"))  # not valid UTF-8
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, packed."""
    out = tmp_path_factory.mktemp("packed") / "new" / "out"
    found = pack(f"folder:{folder}", out, shard_size=1)
    assert found == {"images": NUMBER, "missing": 1, "shards": 3}
    return out


def pixels_of(source: EncodedSource, index: int) -> np.ndarray | None:
    """The pixels, or None if the image is unreadable."""
    try:
        return decode(source.image(index))
    except UnreadableImage:
        return None


def assert_same(ours: EncodedSource, theirs: EncodedSource) -> None:
    assert len(ours) == len(theirs)
    assert ours.class_names == theirs.class_names
    for i in range(len(theirs)):
        assert (ours.label(i), ours.name(i)) == (theirs.label(i), theirs.name(i))
        np.testing.assert_array_equal(pixels_of(ours, i), pixels_of(theirs, i))


def test_reads_like_the_folder(folder: Path, packed: Path) -> None:
    ours, theirs = open_source(f"records:{packed}"), open_source(f"folder:{folder}")
    assert_same(ours, theirs)
    assert ours.class_names == ("ant", "bee")
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert len({ours.stamp(i) for i in range(NUMBER)}) == NUMBER
    for i in set(range(NUMBER)) - {GONE}:
        assert ours.encoded(i) == Path(theirs.name(i)).read_bytes()
    assert [i for i in range(NUMBER) if pixels_of(ours, i) is None] == [NO_IMAGE, GONE]
    assert "tensorflow" not in sys.modules


def test_gives_the_same_training_batches(folder: Path, packed: Path) -> None:
    settings = {"batch_size": 7, "seed": 1, "start_step": 3, "canvas_size": 240, "num_threads": 3}
    ours, theirs = (
        train_batches(Records(open_source(spec)), **settings)
        for spec in (f"records:{packed}", f"folder:{folder}")
    )
    for a, b in itertools.islice(zip(ours, theirs, strict=True), 6):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_many_threads_read_any_record(packed: Path) -> None:
    one = open_source(f"records:{packed}")
    expected = [one.encoded(i) for i in range(NUMBER)]
    source = open_source(f"records:{packed}")  # no thread has opened its files yet
    indices = list(range(NUMBER)) * 20
    random.Random(0).shuffle(indices)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(source.encoded, indices))
    assert found == [expected[i] for i in indices]


@pytest.mark.parametrize("spec", ["shapes:12@val", "shapes:40[5:25]"])
def test_pixels_without_files_become_png(spec: str, tmp_path: Path) -> None:
    pack(spec, tmp_path / "out")
    source = open_source(f"records:{tmp_path}@out")
    assert_same(source, open_source(spec))
    assert source.image(3).format == "PNG"
    assert source.spec == f"records:{tmp_path}@out"


def test_grey_pixels_without_class_names(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 20), np.uint8)
    for name, array in {"images-idx3": images, "labels-idx1": np.arange(5, dtype=np.uint8)}.items():
        header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    spec = f"idx:{tmp_path}@train"
    pack(spec, tmp_path / "out")
    source = open_source(f"records:{tmp_path}/out")
    assert_same(source, open_source(spec))
    assert source.image(0).mode == "L"
    assert source.class_names is None


def test_packing_again_gives_the_same_bytes(folder: Path, packed: Path, tmp_path: Path) -> None:
    """For any number of threads, and also if a packed source is packed."""
    pack(f"folder:{folder}", tmp_path / "again", shard_size=1, num_threads=1)
    pack(f"records:{packed}", tmp_path / "twice", shard_size=1)
    files = sorted(path.name for path in packed.iterdir())
    assert files == [*(f"0000{i}.array_record" for i in range(3)), "index.npz", "records.json"]
    for copy in ("again", "twice"):
        assert sorted(path.name for path in (tmp_path / copy).iterdir()) == files
        for name in files if copy == "again" else files[:-1]:
            assert (tmp_path / copy / name).read_bytes() == (packed / name).read_bytes()


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["pack", str(folder), f"{tmp_path}/out", "--num-threads", "2"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"packed {NUMBER} images of folder:{folder} into 1 files, 2.4 MiB; ")
    assert shown[1] == "1 of them could not be read and are stored as empty records"
    with pytest.raises(SystemExit) as stop:
        cli.main(["pack", str(folder), f"{tmp_path}/out"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: out={tmp_path}/out already exists: remove it, or choose another folder\n"
    )


def test_missing_files_are_logged(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pack(f"folder:{folder}", tmp_path / "out")
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{folder}/ant" in message
    assert "No such file" in message


def test_a_shard_size_of_zero_is_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard_size=0 must be at least 1 MiB"):
        pack(f"folder:{folder}", tmp_path / "out", shard_size=0)
    assert not list(tmp_path.iterdir())


def test_a_negative_number_of_threads_is_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="num_threads=-3 must be at least 1"):
        pack(f"folder:{folder}", tmp_path / "out", num_threads=-3)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_another_pack_is_not_touched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if that one starts while this one opens the source."""
    theirs = tmp_path / "out.part" / "00000.array_record"

    def open_meanwhile(spec: str) -> EncodedSource:
        theirs.parent.mkdir()
        theirs.touch()
        return open_source(spec)

    monkeypatch.setattr("dino_jax.jobs.pack.open_source", open_meanwhile)
    with pytest.raises(UsageError, match=r"out\.part is left over from an interrupted `pack`"):
        pack(f"folder:{folder}", tmp_path / "out")
    assert theirs.exists()


def test_an_unwritable_folder_is_rejected(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"out=.*/file/out cannot be written: .*Not a directory"):
        pack(f"folder:{folder}", tmp_path / "file" / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_stopped_pack_leaves_no_files(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FolderSource.encoded

    def encoded(self: FolderSource, index: int) -> bytes:
        if index == NUMBER - 1:
            raise error
        return read(self, index)

    monkeypatch.setattr(FolderSource, "encoded", encoded)
    expected = UsageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        pack(f"folder:{folder}", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_pack_is_recognised(folder: Path, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "out.part")
    (tmp_path / "out.part" / "records.json").unlink()
    for spec in (f"records:{tmp_path}/out", f"records:{tmp_path}/out.part"):
        with pytest.raises(UsageError, match=r"packing was interrupted: remove .*out\.part, which"):
            open_source(spec)
    with pytest.raises(UsageError, match=r"out\.part is left over from an interrupted `pack`"):
        pack(f"folder:{folder}", tmp_path / "out")


def listing(**changes: object) -> Callable[[Path], object]:
    return edit("records.json", lambda text: json.dumps(json.loads(text) | changes).encode())


def other_count(root: Path) -> None:
    writer = ArrayRecordWriter(str(root / "00001.array_record"), "group_size:1")
    writer.write(b"one record")
    writer.close()
    about = json.loads((root / "records.json").read_text())
    about["shards"][1]["bytes"] = (root / "00001.array_record").stat().st_size
    (root / "records.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "00001.array_record").unlink(), "00001.array_record is missing"),
        (edit("00001.array_record", lambda b: b[:-9]), r"has \d+ bytes instead of \d+; copy"),
        (edit("00001.array_record", lambda b: bytes(len(b))), "a file in .* is damaged"),
        (other_count, f"lists {NUMBER} records, but .* contains .*, {NUMBER} labels"),
        (lambda root: (root / "index.npz").unlink(), "index.npz cannot be read"),
        (edit("index.npz", lambda b: b[: len(b) // 2]), "index.npz cannot be read"),
        (edit("records.json", lambda b: b[: len(b) // 2]), "records.json is damaged"),
        (lambda root: (root / "records.json").unlink(), "records.json does not exist: give a"),
        (listing(format="recipes"), "records.json does not have the format 'dino_jax records'"),
        (edit("records.json", lambda _: b"[]"), "records.json does not have the format"),
        (listing(version=2), "format version 2, but this dino_jax reads version 1: use the dino"),
    ],
)
def test_a_damaged_folder_is_rejected(
    change: Callable[[Path], object], message: str, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(UsageError, match=message) as caught:
        open_source(f"records:{tmp_path}/copy")
    assert str(caught.value).startswith(f"source 'records:{tmp_path}/copy': ")
    assert "\n" not in str(caught.value)


def test_a_damaged_record_is_reported(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")

    def flip(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    edit("00000.array_record", flip)(tmp_path / "copy")
    source = open_source(f"records:{tmp_path}/copy")
    with pytest.raises(UsageError, match=r"record \d+ of records:.* cannot be read .*copy the"):
        [source.encoded(index) for index in range(NUMBER)]
