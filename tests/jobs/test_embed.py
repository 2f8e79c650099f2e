"""Features written to files."""

import csv
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import embedding_files
from dino_jax.evaluate.features.extractor import Extraction, Extractor
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.evaluate.features.tokens import BlockTokens, ClassToken
from dino_jax.jobs import embed as embed_job
from dino_jax.jobs.embed import embed

OPTIONS = Extraction(resize=16, crop=16, canvas_size=32, batch_size=8, num_threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures in two classes, one of them unreadable; one name is not ASCII."""
    root = tmp_path_factory.mktemp("images")
    for i in range(11):
        path = root / "ab"[i % 2] / (f"{i}.png" if i != 4 else "vier ä.png")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 20), (20 * i, 255 - 20 * i, 9 * i)).save(path)
    (root / "b" / "7.png").write_text("no picture")
    return root


def read(path: Path) -> tuple[np.ndarray, list[str], list[int]]:
    """Features, names and labels from a file of any format."""
    if path.suffix == ".npy":
        with path.with_suffix(".csv").open(newline="", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["row"]) for row in rows] == list(range(len(rows)))
        return np.load(path), [r["name"] for r in rows], [int(r["label"]) for r in rows]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    shape = json.loads(table.schema.metadata[b"shape"])
    features = np.stack(table["feature"].to_numpy()).reshape(-1, *shape)
    return features, table["name"].to_pylist(), table["label"].to_pylist()


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_every_image_with_its_name(suffix: str, weights: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / f"features{suffix}"
    found = embed(weights, str(folder), output, options=OPTIONS)
    source = open_source(str(folder))
    (expected,) = Extractor(weights, OPTIONS).features(ClassToken(), [source])
    features, names, labels = read(output)
    np.testing.assert_array_equal(features, expected.features)
    assert features.dtype == np.float32
    assert names == [source.name(int(i)) for i in expected.index]
    assert labels == expected.labels.tolist()
    assert found == {"images": 10, "shape": [48]}
    about = json.loads(output.with_suffix(".json").read_text())
    assert about["metrics"]["unreadable_images"] == {source.spec: 1}
    assert len(about["weights"]["sha256"]) == 64
    kept = {".npy": 3}.get(suffix, 2)
    assert len(list(output.parent.iterdir())) == kept  # nothing temporary is left


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_patches_of_the_first_block(
    suffix: str, weights: str, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"patches{suffix}"
    found = embed(weights, str(folder), output, tokens="patches", block=0, options=OPTIONS)
    assert found == {"images": 10, "shape": [4, 48]}
    extractor = Extractor(weights, OPTIONS)
    first = BlockTokens("patches", from_last=len(extractor.model.blocks))
    (expected,) = extractor.features(first, [open_source(str(folder))])
    np.testing.assert_array_equal(read(output)[0], expected.features)


def test_blocks_count_from_both_ends(weights: str, tmp_path: Path) -> None:
    arguments = {"weights": weights, "data": "shapes:9", "options": OPTIONS}
    for name, block in {"a": 1, "b": -1}.items():
        embed(**arguments, output=tmp_path / f"{name}.npy", tokens="all", block=block)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert np.load(tmp_path / "a.npy").shape == (9, 5, 48)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_stop_midway_leaves_no_file(suffix: str, tmp_path: Path) -> None:
    batch = Features(np.ones((2, 3), np.float32), np.zeros(2, np.int32), np.arange(2))

    def stopped() -> None:
        with embedding_files.FORMATS[suffix](tmp_path / f"x{suffix}", (3,)) as append:
            append(batch, ["a", "b"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())


def test_rows_are_on_disk_before_the_end(tmp_path: Path) -> None:
    """However many rows there are, few are in memory at a time."""
    batch = Features(
        np.ones((10_000, 8), np.float32), np.zeros(10_000, np.int32), np.arange(10_000)
    )
    names = ["name"] * 10_000
    sizes = []
    with embedding_files.open_npy(tmp_path / "x.npy", (8,)) as append:
        for _ in range(4):
            append(batch, names)
            sizes.append((tmp_path / ".x.part.npy").stat().st_size)
    assert np.diff(sizes) == pytest.approx(32 * 10_000, abs=1 << 17)  # up to the file's buffer
    features, names, _ = read(tmp_path / "x.npy")
    assert features.shape == (40_000, 8)
    assert names[-1] == "name"


class Generated:
    """So many pictures of which none is kept."""

    spec, class_names, labels = "generated", None, None

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (32, 32), (index % 256, 0, 0))

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return f"{index:06}"


def test_more_images_need_no_more_memory(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks, row = {}, 17 * 48 * 4  # bytes of an image's tokens
    options = Extraction(resize=32, crop=32, canvas_size=32, batch_size=16, num_threads=2)
    extractor = Extractor(weights, options)
    monkeypatch.setattr(embed_job, "Extractor", lambda *_: extractor)
    for count in (16, 160, 800):  # the first compiles
        monkeypatch.setattr(embed_job, "open_source", lambda _, count=count: Generated(count))
        if count > 16:
            tracemalloc.start()
        try:
            embed(weights, "generated", tmp_path / "x.npy", tokens="all", options=options)
            peaks[count] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert np.load(tmp_path / "x.npy").shape == (800, 17, 48)
    assert peaks[800] - peaks[160] < 0.25 * (800 - 160) * row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": Path("x.txt")}, r"output=x.txt must end in \.npy \(.*\) or \.parquet"),
        ({"output": Path("x.npz")}, r"output=x.npz must end in \.npy \(.*\) or \.parquet"),
        (
            {"block": 2},
            r"block=2 must be from 0 to 1, or from -1 \(the last\) to -2: the ba",
        ),
        ({"block": -3}, "block=-3 must be from 0 to 1"),
        ({"data": "shapes:9@nope"}, "no split 'nope'"),
    ],
)
def test_wrong_arguments(
    changes: dict[str, Any], message: str, weights: str, tmp_path: Path
) -> None:
    arguments = {"weights": weights, "data": "shapes:9", "output": tmp_path / "x.npy"}
    with pytest.raises(UsageError, match=message):
        embed(**(arguments | {"options": OPTIONS} | changes))


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.json"])
def test_a_file_that_cannot_be_written_is_said_before_the_pass(
    name: str, weights: str, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    with (
        mock.patch.object(Extractor, "stream", side_effect=AssertionError("computed")),
        pytest.raises(UsageError, match=f"output=.*{name} cannot be written"),
    ):
        embed(weights, "shapes:9", tmp_path / "x.npy", options=OPTIONS)


def test_parquet_seeks_no_repeats_among_floats(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    batch = Features(np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.arange(4))
    with embedding_files.open_parquet(tmp_path / "x.parquet", (3,)) as append:
        append(batch, ["a", "b", "a", "b"])
    group = parquet.read_metadata(tmp_path / "x.parquet").row_group(0)
    columns = {c.path_in_schema.split(".")[0]: c for c in map(group.column, range(4))}
    dictionaries = {name for name, column in columns.items() if column.has_dictionary_page}
    assert dictionaries == {"name", "label"}


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """A file system may hold any bytes."""
    batch = Features(np.ones((1, 3), np.float32), np.zeros(1, np.int32), np.arange(1))
    name = os.fsdecode(b"caf\xe9.png")
    for suffix, expected in {".npy": name, ".parquet": "caf\ufffd.png"}.items():
        path = tmp_path / f"x{suffix}"
        with embedding_files.FORMATS[suffix](path, (3,)) as append:
            append(batch, [name])
        assert read(path)[1] == [expected]


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="Parquet needs pip install pyarrow"):
        embed("w", "shapes:9", Path("x.parquet"))
