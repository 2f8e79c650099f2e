"""The attention job, and its score against true masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax import memory
from dino_jax.errors import UsageError
from dino_jax.jobs import attention_score as score_job
from dino_jax.jobs.attention import attention
from dino_jax.jobs.attention_score import attention_score
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
    with pytest.raises(UsageError, match=r"picture_0: 56x40 pixels are 36 tokens, .*a smaller"):
        attention(weights, ("shapes:1@test",), tmp_path, size=(40, 56))


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 60.0])
def test_refuses_thresholds(threshold: float, weights: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"threshold={threshold} must lie between 0 and 1"):
        attention(weights, ("shapes:1@test",), tmp_path, threshold=threshold)


def test_refuses_weights_without_attention(goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"linear.pth is a Linear, which has no attention"):
        attention(str(goldens / "pth" / "linear.pth"), ("shapes:1@test",), tmp_path)


def test_scores_before_and_after_training(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that follows brightness finds these shapes, which are the brighter part."""
    attention_of = score_job.attention_of

    def bright(model: object, info: object) -> object:
        if info.which == "untrained":
            return attention_of(model, info)
        blocks = lambda image: image.reshape(8, 8, 8, 8, 3).mean((1, 3, 4))  # noqa: E731
        return lambda image: np.stack([np.maximum(blocks(image) - 110, 0), np.ones((8, 8))])

    monkeypatch.setattr(score_job, "attention_of", bright)
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
    with pytest.raises(UsageError, match=r"has no true masks to compare with: give shapes:N@test"):
        attention_score(weights, str(tmp_path), output=tmp_path / "r.json")
