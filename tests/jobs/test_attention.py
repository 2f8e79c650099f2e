"""The attention job, and its score against true masks."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax import memory, sharding
from dino_jax.data.pipeline import Records
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.jobs import attention as attention_job
from dino_jax.jobs import attention_score as score_job
from dino_jax.jobs.attention import attention
from dino_jax.jobs.attention_score import attention_score
from dino_jax.jobs.drawing import over_pictures
from dino_jax.visualize.sheet import TILE


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_writes_maps_masks_and_a_sheet_of_each_picture(weights: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    output = tmp_path / "out"
    folder = output / "picture_0-attention"
    folder.mkdir(parents=True)
    for name in ("head3.png", "head11-mask.png", "notes.png"):
        (folder / name).touch()  # of a network with more heads, and a file of the user's
    sheets = attention(weights, ("shapes:2@test", str(bad)), output, size=(40, 56))
    assert sheets == [output / f"picture_{i}-attention.png" for i in range(2)]
    maps = ["mean", "head0", "head1", "head2"]
    parts = {f"{part}{kind}.png" for kind in ("", "-mask") for part in maps}
    (folder / "notes.png").unlink()
    for sheet in sheets:
        folder = sheet.with_suffix("")
        assert {path.name for path in folder.iterdir()} == parts | {"image.png"}
        for path in folder.iterdir():
            assert read(path).shape == (40, 56, 3)
        # Two rows of five: image and mean before the heads.
        assert read(sheet).shape[1] > 5 * TILE
    result = json.loads((output / "results.json").read_text())
    assert result["metrics"] == {"images": 2, "unreadable_images": [str(bad)]}
    assert result["settings"]["size"] == [40, 56]
    assert len(result["weights"]["sha256"]) == 64


def test_maps_are_constant_within_a_patch(weights: str, tmp_path: Path) -> None:
    attention(weights, ("shapes:1@test",), tmp_path, size=(40, 56))
    pixels = read(tmp_path / "picture_0-attention" / "head1.png")
    np.testing.assert_array_equal(pixels[::8, ::8], pixels[7::8, 7::8])
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_without_threshold_no_masks(weights: str, tmp_path: Path) -> None:
    (sheet,) = attention(weights, ("shapes:1@test",), tmp_path, size=(0,), threshold=None)
    assert not list(sheet.with_suffix("").glob("*mask*"))
    assert read(sheet).shape[0] < 2 * TILE


def test_a_picture_that_memory_does_not_hold(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"picture 0: 56x40 pixels are 36 tokens, .*a smaller"):
        attention(weights, ("shapes:1@test",), tmp_path, size=(40, 56))


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 60.0])
def test_refuses_thresholds(threshold: float, weights: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"threshold={threshold} must be between 0 and 1"):
        attention(weights, ("shapes:1@test",), tmp_path, threshold=threshold)


def test_refuses_weights_without_attention(goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"linear.pth is a linear classifier: give a backbone"):
        attention(str(goldens / "pth" / "linear.pth"), ("shapes:1@test",), tmp_path)


def test_maps_of_eight_devices_are_those_of_one(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of two sizes, and more of them than a batch holds; one is unreadable."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 20 * (i % 2), 48, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i:02}.png")
    (images / "04.png").write_text("no picture")
    seen: list[dict[int, np.ndarray]] = []

    def kept(*arguments: object) -> Iterator[tuple[int, np.ndarray]]:
        seen.append({})
        for index, maps in over_pictures(*arguments):
            seen[-1][index] = maps
            yield index, maps

    monkeypatch.setattr(attention_job, "over_pictures", kept)
    for devices in (8, 1):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        with mock.patch.object(sharding, "make_mesh", return_value=mesh):
            attention(weights, (str(images),), tmp_path / "out", size=(40,))
    many, one = seen
    assert sorted(many) == [i for i in range(12) if i != 4]
    assert {maps.shape for maps in many.values()} == {(3, 5, 6), (3, 6, 5)}
    for index, maps in one.items():
        np.testing.assert_allclose(many[index], maps, rtol=0, atol=1e-6)


def test_any_number_of_unreadable_pictures(
    weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"{i}.png").write_text("no picture")
    Image.new("RGB", (20, 10), (9, 99, 199)).save(images / "good.png")
    arguments = {"weights": weights, "image": (str(images),), "output": tmp_path / "out"}
    sheets = attention(**arguments, size=(16,))
    assert [sheet.name for sheet in sheets] == ["good-attention.png"]
    assert f"unreadable image {images / '7.png'}" in caplog.text
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["metrics"]["unreadable_images"]) == 20
    with pytest.raises(UsageError, match=r"cannot be read, but max_unreadable=0.1 allows 10"):
        attention(**arguments, size=(16,), options=PassOptions(max_unreadable=0.1))
    (images / "good.png").unlink()
    for size in ((16,), (16, 24)):
        with pytest.raises(UsageError, match=r"none of the 20 images of .* can be read: see the"):
            attention(**arguments, size=size)


def test_scores_before_and_after_training(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that follows brightness finds these shapes, which are the brighter part."""

    def bright(
        backbone: PlacedBackbone, feature: object, records: Records, size: tuple[int, ...]
    ) -> Iterator[tuple[int, np.ndarray]]:
        if backbone.info.which == "untrained":
            yield from over_pictures(backbone, feature, records, size)
            return
        for index in range(len(records)):
            image = np.asarray(records.source.image(index).resize((64, 64)), float)
            blocks = image.reshape(8, 8, 8, 8, 3).mean((1, 3, 4))
            yield index, np.stack([np.maximum(blocks - 110, 0), np.ones((8, 8))])

    monkeypatch.setattr(score_job, "over_pictures", bright)
    output = tmp_path / "r.json"
    scores = attention_score(weights, "shapes:20@test", size=(64, 64), threshold=0.9, output=output)
    assert list(scores) == ["untrained", "teacher"]
    assert list(scores["untrained"]) == ["mean", "head 0", "head 1", "head 2", "best head"]
    teacher = scores["teacher"]
    assert teacher["head 0"] > 60 > 40 > teacher["head 1"] > 20
    assert teacher["best head"] == pytest.approx(teacher["head 0"], abs=1)
    assert scores["untrained"]["best head"] < 40
    assert json.loads(output.read_text())["metrics"] == scores


def test_score_needs_true_masks(weights: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UsageError, match=r"has no true masks to compare with: use shapes:N@test"):
        attention_score(weights, str(tmp_path), output=tmp_path / "r.json")
