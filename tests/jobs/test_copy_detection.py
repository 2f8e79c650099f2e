"""The descriptor and the score of copies; the job on a Copydays of eight photographs."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageEnhance, ImageFilter

import dino_jax
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import backbone
from dino_jax.evaluate.features.backbone import PassOptions
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.picture_pass import PicturePass
from dino_jax.evaluate.retrieval.copy_detection import copy_precisions, generalized_mean
from dino_jax.evaluate.retrieval.copydays import open_copydays
from dino_jax.evaluate.retrieval.ranking import average_precision
from dino_jax.evaluate.retrieval.whitening import learn_whitening
from dino_jax.jobs.copy_detection import copy_detection
from tests.conftest import parity_cases
from tests.support.photographs import photographs

SIDE = 64
CHANCE = (1 + sum(1 / (2 * place) for place in range(2, 9))) / 8  # of one original among eight


class Tokenless(nnx.Module):
    """A backbone without patch tokens, as a ResNet is."""

    family = "resnet"


def attacks(picture: Image.Image) -> list[Image.Image]:
    """Strong ones: cut and darkened, turned and faded, blurred and squeezed."""
    width, height = picture.size
    cut = picture.crop((width // 8, height // 8, width * 7 // 8, height))
    turned = picture.rotate(8, Image.Resampling.BICUBIC)
    blurred = picture.filter(ImageFilter.GaussianBlur(3)).resize((width, height * 2 // 3))
    return [
        ImageEnhance.Brightness(cut).enhance(0.7),
        ImageEnhance.Contrast(turned).enhance(0.6),
        blurred,
    ]


def crop(picture: Image.Image, percent: int) -> Image.Image:
    """Without so many percent of its surface."""
    width, height = (round(side * (1 - percent / 100) ** 0.5) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copydays")
    subsets = ("original", "strong", "jpegqual/3", "jpegqual/20", "crops/10", "crops/50")
    for subset in subsets:
        (root / subset).mkdir(parents=True)
    for i, picture in enumerate(photographs().values()):
        name = f"{2000 + i}00.jpg"
        picture.save(root / "original" / name, quality=95)
        for j, attacked in enumerate(attacks(picture)):
            attacked.save(root / "strong" / f"{2000 + i}{j + 1:02}.jpg", quality=30)
        for quality in (3, 20):
            picture.save(root / f"jpegqual/{quality}" / name, quality=quality)
        for percent in (10, 50):
            crop(picture, percent).save(root / f"crops/{percent}" / name, quality=90)
    (root / "jpegqual").rename(root.with_name("elsewhere"))
    (root / "jpegqual").symlink_to(root.with_name("elsewhere"))  # as archives on another disk
    for hidden in ("strong/._200001.jpg", ".thumbnails/200000.jpg"):  # as desktops leave behind
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).touch()
    return root


def run(goldens: Path, data: Path, output: Path, **settings: Any) -> dict[str, Any]:
    options = PassOptions(batch_size=16, num_threads=2)
    weights = str(goldens / "pth/backbone.pth")
    settings = {"image_size": SIDE} | settings
    return copy_detection(weights, data, output=output, options=options, **settings)


def descriptors(goldens: Path, paths: list[Path]) -> np.ndarray:
    """Picture by picture: Pillow's squeezing, and NumPy on the tokens."""
    model, info = dino_jax.load(goldens / "pth/backbone.pth")
    tokens_of = jax.jit(lambda images: model.get_intermediate_layers(images, 1)[0])
    rows = []
    for path in paths:
        image = Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - info.mean) / info.std
        tokens = np.asarray(tokens_of(pixels[None].astype(np.float32)))[0]
        gem = (np.maximum(tokens[1:], 1e-6) ** 4).mean(axis=0) ** 0.25
        rows.append(np.concatenate([tokens[0], gem]))
    return np.stack(rows)


@pytest.mark.parametrize("path", parity_cases("copydays_ap*.json"), ids=lambda p: p.stem)
def test_equals_the_reference(path: Path) -> None:
    for case in json.loads(path.read_text()):
        found = average_precision(np.array(case["ranks"], np.int64), case["nres"])
        assert found == pytest.approx(case["ap"], abs=1e-12)


def test_generalized_mean_by_hand() -> None:
    tokens = np.array([[[1.0, -5.0], [2.0, 3.0], [3.0, -1.0]]])
    np.testing.assert_allclose(generalized_mean(tokens, 1), [[2, 1]], rtol=1e-5)
    fourth = [((1 + 16 + 81) / 3) ** 0.25, (81 / 3) ** 0.25]
    np.testing.assert_allclose(generalized_mean(tokens), [fourth], rtol=1e-5)


def test_only_the_first_results_count() -> None:
    database = np.eye(4) + 0.1
    pictures = np.array(["a", "b", "b", ""])
    queries = np.array([[0, 3, 2, 1.0], [0, 0, 0, 1.0]])
    of = np.array(["b", "a"])
    # b is found at once and again; a only behind the distractor, if at all.
    np.testing.assert_allclose(copy_precisions(queries, of, database, pictures), [1, 0.25])
    np.testing.assert_allclose(copy_precisions(queries, of, database, pictures, 1), [0.5, 0])


def test_twenty_results_count() -> None:
    """Of 25 originals; those of two queries stand in the places 20 and 21."""
    pictures = np.array([f"{i:02}" for i in range(25)])
    likeness = -np.arange(25.0)[None]
    precisions = copy_precisions(np.ones((2, 1)), np.array(["19", "20"]), likeness.T, pictures)
    np.testing.assert_allclose(precisions, [(0 + 1 / 20) / 2, 0])


def test_strong_copies_are_found_by_a_random_network(
    goldens: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    scores = run(goldens, folder, output)
    subsets = ["original", "strong", "crops/10", "crops/50", "jpegqual/3", "jpegqual/20"]
    assert list(scores) == subsets
    assert [row["queries"] for row in scores.values()] == [8, 24, 8, 8, 8, 8]
    assert scores["original"]["map"] == 100
    assert scores["strong"]["map"] > 100 * 2.5 * CHANCE
    originals, strong = (sorted((folder / name).glob("2*")) for name in ("original", "strong"))
    names = [np.array([path.name[:4] for path in paths]) for paths in (strong, originals)]
    rows = descriptors(goldens, [*strong, *originals])
    expected = copy_precisions(rows[:24], names[0], rows[24:], names[1]).mean()
    assert scores["strong"]["map"] == pytest.approx(100 * expected, abs=0.1)
    result = json.loads(output.read_text())
    assert result["metrics"]["copy_detection"] == scores
    assert result["metrics"]["images_of_distractors"] == 0
    assert result["settings"]["whitening"] is None
    assert "with no distractors and no whitening" in capsys.readouterr().out


def test_distractors_and_whitening_take_part_and_are_said(
    goldens: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Poor JPEGs of the originals join them, under no name; whitening is learned on the crops."""
    output = tmp_path / "results.json"
    jpegs, crops = (str(folder / name) for name in ("jpegqual/20", "crops"))
    others = {"distractors": jpegs, "whitening": crops}
    others |= {"cache": FeatureCache(save_features=tmp_path / "store")}
    scores = run(goldens, folder, output, **others)
    with mock.patch.object(PicturePass, "stream", side_effect=AssertionError("computed")):
        assert run(goldens, folder, output, **others) == scores  # at once
    said = "with 8 distractors and whitening learned on 16 images"
    assert said in capsys.readouterr().out
    metrics = json.loads(output.read_text())["metrics"]
    assert (metrics["images_of_distractors"], metrics["images_of_whitening"]) == (8, 16)
    parts = {
        name: sorted((folder / name).rglob("2*.jpg"))
        for name in ("strong", "original", "jpegqual/20", "crops")
    }
    rows = descriptors(goldens, [path for paths in parts.values() for path in paths])
    queries, database, crops = np.split(rows, [24, 40])
    whitening = learn_whitening(crops)
    names = {name: [path.name[:4] for path in paths] for name, paths in parts.items()}
    expected = copy_precisions(
        whitening.apply(queries),
        np.array(names["strong"]),
        whitening.apply(database),
        np.array([*names["original"], *[""] * 8]),
    )
    assert scores["strong"]["map"] == pytest.approx(100 * expected.mean(), abs=1)
    assert scores["jpegqual/20"]["map"] == 25  # each stands behind itself
    assert scores["original"]["map"] == 100


def test_broken_pictures_are_named_and_left_out(
    goldens: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An original, whose copies then have nothing to find, and a copy of another."""
    data = tmp_path / "copydays"
    for name in ("original", "strong"):
        (data / name).mkdir(parents=True)
        for path in (folder / name).glob("2*.jpg"):
            (data / name / path.name).write_bytes(path.read_bytes())
    broken = [data / "original/200200.jpg", data / "strong/200501.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:700])
    output = tmp_path / "results.json"
    scores = run(goldens, data, output)
    assert [row["queries"] for row in scores.values()] == [7, 20]
    assert json.loads(output.read_text())["metrics"]["unreadable_images"] == list(map(str, broken))
    assert "skipped: 2" in capsys.readouterr().out


def test_wrong_arguments(
    goldens: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    with pytest.raises(UsageError, match=r"no images in .*crops/original: use the folder"):
        run(goldens, folder / "crops", output)
    with pytest.raises(UsageError, match="image_size=0 must be at least 1"):
        run(goldens, folder, output, image_size=0)
    with pytest.raises(UsageError, match=r"nowhere is not a folder"):
        run(goldens, folder, output, distractors="/nowhere")
    (tmp_path / "orphan" / "original").mkdir(parents=True)
    (tmp_path / "orphan" / "strong").mkdir()
    for name in ("original/200000.jpg", "strong/200101.jpg"):
        (tmp_path / "orphan" / name).touch()
    with pytest.raises(UsageError, match=r"strong without an original: 200101\.jpg"):
        open_copydays(tmp_path / "orphan")
    _, info = dino_jax.load(goldens / "pth/backbone.pth")
    monkeypatch.setattr(backbone, "load", lambda *_, **__: (Tokenless(), info))
    with pytest.raises(UsageError, match=r"Tokenless does not give the tokens .*: use a ViT"):
        run(goldens, folder, output)
