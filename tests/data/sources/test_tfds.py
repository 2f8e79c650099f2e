"""Prepared TFDS datasets, read without TensorFlow and without the network."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from tests.support.scripts import run_script

BROKEN = 7  # the training example that is not an image


class OfflineBuilder(tfds.dataset_builders.AdhocBuilder):
    """Skips the two places where tfds needs TensorFlow or an undeclared package."""

    code_path = None

    def _split_generators(self, _: object) -> dict:
        return {split: enumerate(examples) for split, examples in self._split_datasets.items()}


def prepare(
    root: Path, name: str = "tiny", *, labelled: bool = True, image_features: tuple = ("image",)
) -> None:
    """Writes a dataset of 20 training and 4 test images; each has its number as red value."""
    features = {"file": tfds.features.Text()} | {k: tfds.features.Image() for k in image_features}
    if labelled:
        features["label"] = tfds.features.ClassLabel(names=["ant", "bee", "cow"])

    def example(number: int) -> dict:
        file = io.BytesIO()
        Image.new("RGB", (5, 3 + number % 3), (number, 0, 0)).save(file, "PNG")
        content = b"<html>" if number == BROKEN else file.getvalue()
        values = {"file": str(number), "label": number % 3} | dict.fromkeys(image_features, content)
        return {key: values[key] for key in features}

    OfflineBuilder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            "train": [example(i) for i in range(20)],
            "test": [example(i) for i in range(4)],
        },
        data_dir=root,
        file_format="array_record",
    ).download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    prepare(root)
    return root


@pytest.fixture
def tfds_root(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets TFDS_DATA_DIR to the folder with the dataset `tiny`."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return prepared


@pytest.mark.usefixtures("tfds_root")
@pytest.mark.parametrize("spec", ["tfds:tiny@train", "tfds:tiny:1.0.0@train"])
def test_reads_images_with_their_labels(spec: str) -> None:
    source = open_source(spec)
    assert len(source) == 20
    assert source.class_names == ("ant", "bee", "cow")
    seen = {}
    for index in range(20):
        try:
            pixels = decode(source.image(index))
        except UnreadableImage:
            seen[BROKEN] = source.label(index)
        else:
            number = int(pixels[0, 0, 0])
            assert pixels.shape == (3 + number % 3, 5, 3)
            seen[number] = source.label(index)
    assert seen == {i: i % 3 for i in range(20)}
    assert source.name(3) == f"{spec} record 3"
    with Image.open(io.BytesIO(source.encoded(3))) as image:  # the original file
        assert image.format == "PNG"
        np.testing.assert_array_equal(decode(image), decode(source.image(3)))


@pytest.mark.usefixtures("tfds_root")
def test_labels_without_images() -> None:
    source = open_source("tfds:tiny@train")
    labels = [source.label(i) for i in range(20)]
    assert np.bincount(labels).tolist() == [7, 7, 6]
    assert [source.label(i) for i in range(20)] == labels  # from the cache


@pytest.mark.usefixtures("tfds_root")
def test_stamps_differ_between_images_and_splits() -> None:
    sources = [open_source(f"tfds:tiny@{split}") for split in ("train", "test")]
    stamps = [source.stamp(i) for source in sources for i in range(2)]
    assert len(set(stamps)) == 4
    assert all("tiny/1.0.0" in stamp for stamp in stamps)  # the version


@pytest.mark.usefixtures("tfds_root")
def test_slices() -> None:
    assert len(open_source("tfds:tiny@train[:10%]")) == 2
    assert len(open_source("tfds:tiny@train[5:]+test")) == 19


@pytest.mark.usefixtures("tfds_root")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny@validation", "one of the splits (train, test|test, train)"),
        ("tfds:tiny@train[:x]", "one of the splits (train, test|test, train)"),
        ("tfds:tiny@train[20:]", "one of the splits (train, test|test, train)"),
        ("tfds:tiny", "has no split; add one of (@train, @test|@test, @train)"),
        ("tfds:absent@train", "no prepared dataset .*tfds build absent --file_format=arr"),
        ("tfds:tiny:9.9.9@train", "no prepared dataset"),
        ("tfds:not a name@train", "no prepared dataset"),
    ],
)
def test_wrong_sources_are_rejected(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(spec)


def test_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path, labelled=False)
    source = open_source("tfds:tiny@test")
    assert source.class_names is None
    assert source.label(0) == -1


@pytest.mark.parametrize("image_features", [(), ("image", "mask")])
def test_needs_one_image_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_features: tuple
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path, image_features=image_features)
    with pytest.raises(UsageError, match=r"exactly one Image feature, but has (none|\w+, \w+);"):
        open_source("tfds:tiny@test")


def test_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path)
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UsageError, match=r"prepared as tfrecord, .*--file_format=array_record"):
        open_source("tfds:tiny@train")


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the dataset `tiny`, of which a test may damage a file."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return Path(shutil.copytree(prepared / "tiny", tmp_path / "tiny")) / "1.0.0"


@pytest.mark.parametrize("size", [None, 0, 70_000, 65_536, -1], ids=str)
def test_a_truncated_or_missing_file_of_records(damaged: Path, size: int | None) -> None:
    (shard,) = damaged.glob("*train*array_record*")
    content = shard.read_bytes()
    shard.unlink()
    if size is not None:
        shard.write_bytes(content[:size])
    source = open_source("tfds:tiny@train")
    message = "record 0 cannot be read .*tiny/1.0.0 is damaged; copy or prepare"
    with pytest.raises(UsageError, match=message):
        source.encoded(0)
    with pytest.raises(UsageError, match=message):
        source.label(0)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_description(damaged: Path, content: str) -> None:
    (damaged / "dataset_info.json").write_text(content)
    with pytest.raises(UsageError, match=r"dataset_info\.json .* is damaged .*; copy the dataset"):
        open_source("tfds:tiny@train")


def test_a_name_that_tfds_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset's generation code, which may import TensorFlow, is not used."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path, "fashion_mnist")
    assert len(open_source("tfds:fashion_mnist@test")) == 4
    assert "tensorflow" not in sys.modules


@pytest.mark.usefixtures("tfds_root")
def test_needs_no_tensorflow_and_other_kinds_no_tfds() -> None:
    script = """
import sys
from dino_jax.data.decode import decode
from dino_jax.data.sources import open_source
open_source("shapes:3")
assert "tensorflow_datasets" not in sys.modules
source = open_source("tfds:tiny@test")
assert decode(source.image(0)).shape[1:] == (5, 3)
assert sorted(map(source.label, range(4))) == [0, 0, 1, 2]
assert "tensorflow" not in sys.modules
"""
    assert run_script(script) == (0, "", "")
