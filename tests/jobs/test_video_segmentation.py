"""The video segmentation job on a DAVIS of two sequences in its true folder layout."""

import collections
import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

import dino_jax
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.dataset import read_mask, write_mask
from dino_jax.evaluate.davis.propagation import Propagation
from dino_jax.evaluate.davis.report import MEASURES
from dino_jax.evaluate.davis.score import object_scores
from dino_jax.evaluate.features import backbone
from dino_jax.evaluate.features.backbone import PassOptions
from dino_jax.jobs.video_segmentation import video_segmentation
from dino_jax.visualize.video import open_frames
from tests.support.clips import clip
from tests.support.photographs import photographs

HEIGHT, WIDTH, FRAMES, STEP = 64, 128, 6, 8  # pixels; objects move by one patch a frame
SEQUENCES = {  # the size of each object, and where it begins: top, left
    "one": [((40, 42), (16, 8))],
    "two": [((24, 40), (0, 8)), ((24, 24), (40, 16))],
}
HEAD = {  # where a man's head is in frames of a clip: left, top, right, bottom
    0: (59, 12, 113, 101),
    10: (55, 12, 112, 101),
    20: (60, 10, 114, 100),
    30: (52, 13, 109, 97),
    40: (45, 15, 102, 101),
    50: (49, 12, 104, 102),
}


class Tokenless(nnx.Module):
    """A backbone without patch tokens, as a ResNet is."""

    family = "resnet"


def crop(name: str, height: int, width: int) -> Image.Image:
    return photographs()[name].resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Photographs that move to the right over another, a third of the frame, and true masks."""
    root = tmp_path / "davis"
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("\n".join(SEQUENCES))
    for name in SEQUENCES:
        write_sequence(root, name, FRAMES, STEP)
    return root


def write_sequence(root: Path, name: str, frames: int, step: int) -> None:
    images, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for t in range(frames):
        frame, labels = crop("china", HEIGHT, WIDTH), np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, (size, (top, left)) in enumerate(SEQUENCES[name], 1):
            place = left + step * t
            frame.paste(crop(("chelsea", "coffee")[number - 1], *size), (place, top))
            labels[top : top + size[0], place : place + size[1]] = number
        frame.save(images / f"{t:05}.jpg", quality=95)
        write_mask(masks / f"{t:05}.png", labels)


def run(goldens: Path, data: Path, output: Path, **settings: Any) -> dict[str, float] | None:
    options = PassOptions(batch_size=4, num_threads=2)
    weights = str(goldens / "pth/backbone.pth")
    settings = {"image_size": 64} | settings
    return video_segmentation(weights, data, output, options=options, **settings)


def test_moving_objects_are_followed_and_scored(
    goldens: Path, davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    found = run(goldens, davis, output)
    assert tuple(found) == MEASURES
    by_object = []
    for name, objects in SEQUENCES.items():
        assert len(list((output / name).iterdir())) == FRAMES
        scores = []
        for t in range(FRAMES):
            file = f"{name}/{t:05}.png"
            ours = read_mask(output / file, (HEIGHT, WIDTH))
            true = read_mask(davis / "Annotations/480p" / file, (HEIGHT, WIDTH))
            if t == 0:
                np.testing.assert_array_equal(ours, true)
            elif t < FRAMES - 1:
                scores.append(object_scores(ours, true, len(objects)))
        by_object += list(np.mean(scores, axis=0))
    by_object = 100 * np.array(by_object)
    assert found["J-Mean"] == pytest.approx(by_object[:, 0].mean())
    assert found["F-Mean"] == pytest.approx(by_object[:, 1].mean())
    assert found["J&F-Mean"] == pytest.approx(by_object.mean())
    # Even a random network follows; masks that stay where they were are far worse.
    assert by_object[:, 0].min() > 55
    stay = [
        (size[1] - 2.5 * STEP) / (size[1] + 2.5 * STEP) for o in SEQUENCES.values() for size, _ in o
    ]
    assert found["J-Mean"] > 100 * np.mean(stay) + 20
    rows = list(csv.DictReader((output / "per_object.csv").read_text().splitlines()))
    assert [(row["Sequence"], row["Object"]) for row in rows] == [
        ("one", "1"),
        ("two", "1"),
        ("two", "2"),
    ]
    np.testing.assert_allclose([float(row["J-Mean"]) for row in rows], by_object[:, 0], atol=0.01)
    rows = list(csv.DictReader((output / "per_sequence.csv").read_text().splitlines()))
    assert float(rows[1]["F-Mean"]) == pytest.approx(by_object[1:, 1].mean(), abs=0.01)
    shown = capsys.readouterr().out
    assert "all objects" in shown
    assert f"{found['J&F-Mean']:.2f}" in shown
    numbers = [word for line in shown.splitlines()[1:] for word in line.split() if "." in word]
    assert len(numbers) == 3 * len(MEASURES)  # two sequences and all
    assert all(len(number.partition(".")[2]) == 2 for number in numbers)
    result = json.loads((output / "results.json").read_text())
    assert result["metrics"]["video_segmentation"] == found
    assert result["metrics"]["objects"] == 3
    assert result["settings"]["radius"] == 12


def plain_masks(
    goldens: Path, paths: list[Path], first: np.ndarray, settings: Propagation
) -> Iterator[np.ndarray]:
    """Masks of all frames but the first, in NumPy: all similarities of two frames at once."""
    model, info = dino_jax.load(goldens / "pth/backbone.pth")
    tokens_of = jax.jit(lambda images: model.get_intermediate_layers(images, 1)[0][0, 1:])
    side = info.patch_size
    rows, columns = first.shape[0] // side, first.shape[1] // side
    y, x = np.divmod(np.arange(rows * columns), columns)
    near = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x)) <= settings.radius

    def enlarge(n: int) -> np.ndarray:
        """Bilinear, [pixels, patches]."""
        places = (np.arange(n * side) + 0.5) / side - 0.5
        return np.stack([np.interp(places, range(n), patch) for patch in np.eye(n)], axis=1)

    remembered, recent = [], collections.deque(maxlen=settings.last_frames)
    for path in paths:
        pixels = np.asarray(Image.open(path)) / 255
        image = (pixels - (0.485, 0.456, 0.406)) / (0.228, 0.224, 0.225)
        tokens = np.asarray(tokens_of(image[None].astype(np.float32)), np.float64)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        if not remembered:
            middle = first[side // 2 :: side, side // 2 :: side]  # as nearest neighbours
            remembered = [(tokens, np.eye(first.max() + 1)[middle.ravel()])]
            continue
        sources = [*remembered, *recent]
        affinity = [near * np.exp(tokens @ x.T / settings.temperature) for x, _ in sources]
        affinity = np.concatenate(affinity, axis=1)
        affinity[affinity < np.sort(affinity)[:, -settings.top_k, None]] = 0
        shares = affinity / affinity.sum(axis=1, keepdims=True)
        labels = shares @ np.concatenate([labels for _, labels in sources])
        recent.append((tokens, labels))
        soft = labels.reshape(rows, columns, -1)
        soft = np.einsum("yr,rck,xc->yxk", enlarge(rows), soft, enlarge(columns))
        soft -= soft.min(axis=(0, 1))
        yield (soft / soft.max(axis=(0, 1))).argmax(axis=-1)


@pytest.mark.parametrize(
    "settings", [Propagation(), Propagation(last_frames=3, radius=3, top_k=8, temperature=0.02)]
)
def test_equals_the_plain_way(
    goldens: Path, davis: Path, tmp_path: Path, settings: Propagation
) -> None:
    """More frames than are remembered."""
    shutil.rmtree(davis / "JPEGImages")
    shutil.rmtree(davis / "Annotations")
    (davis / "ImageSets/2017/val.txt").write_text("two")
    write_sequence(davis, "two", frames=12, step=4)
    output = tmp_path / "out"
    run(goldens, davis, output, propagation=settings)
    paths = sorted((davis / "JPEGImages/480p/two").iterdir())
    first = read_mask(davis / "Annotations/480p/two/00000.png", (HEIGHT, WIDTH))
    expected = list(plain_masks(goldens, paths, first, settings))
    ours = [read_mask(output / f"two/{t:05}.png", (HEIGHT, WIDTH)) for t in range(1, 12)]
    assert np.count_nonzero(np.array(ours) != expected) < 5  # of 90,000; ties in float32


def test_a_head_is_followed_through_a_real_video(goldens: Path, tmp_path: Path) -> None:
    """A man who speaks in a driving car; the masks are drawn by hand."""
    frames = list(open_frames(clip("carphone_pristine")))
    root, output = tmp_path / "davis", tmp_path / "out"
    for name in ("ImageSets/2017", "JPEGImages/480p/car", "Annotations/480p/car"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("car")
    for t, (number, head) in enumerate(HEAD.items()):
        frame = Image.fromarray(frames[number])
        frame.save(root / f"JPEGImages/480p/car/{t:05}.jpg", quality=95)
        mask = Image.new("L", frame.size)
        ImageDraw.Draw(mask).ellipse(head, fill=1)
        write_mask(root / f"Annotations/480p/car/{t:05}.png", np.asarray(mask))
    found = run(goldens, root, output, image_size=144)
    assert found["J-Mean"] > 60  # a sixth of the frame: all of it would score 16


def test_what_cannot_be_read_is_named_and_left_out(
    goldens: Path, davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken frame, one of another size and a broken mask; of the other sequence, no masks."""
    output = tmp_path / "out"
    frames, masks = davis / "JPEGImages/480p/two", davis / "Annotations/480p/two"
    broken = [frames / "00002.jpg", frames / "00005.jpg", masks / "00003.png"]
    broken[0].write_text("<html>")
    Image.new("RGB", (32, 32)).save(broken[1])
    broken[2].write_bytes(broken[2].read_bytes()[:60])
    for t in range(1, FRAMES):
        (davis / f"Annotations/480p/one/{t:05}.png").unlink()
    (output / "two").mkdir(parents=True)
    for name in ("00002.png", "00099.png", "99.png", "mine.txt"):
        (output / "two" / name).touch()  # of an earlier run, and of others
    found = run(goldens, davis, output)
    metrics = json.loads((output / "results.json").read_text())["metrics"]
    assert metrics["unreadable_images"] == list(map(str, broken))
    assert metrics["sequences_without_score"] == ["one"]
    assert metrics["objects"] == 2
    written = sorted(path.name for path in (output / "two").iterdir())
    masked = [f"{t:05}.png" for t in (0, 1, 3, 4)]
    assert written == [*masked, "99.png", "mine.txt"]
    scores = [
        object_scores(
            *(read_mask(at / f"{t:05}.png", (HEIGHT, WIDTH)) for at in (output / "two", masks)), 2
        )
        for t in (1, 4)
    ]
    assert found["J-Mean"] == pytest.approx(100 * np.mean(scores, axis=(0, 1))[0])
    shown = capsys.readouterr().out
    assert f"unreadable images of {davis}, skipped: 3" in shown
    assert "not scored, for lack of masks: 1 of 2 sequences" in shown


def test_without_any_true_masks_there_is_no_score(
    goldens: Path, davis: Path, tmp_path: Path
) -> None:
    (davis / "ImageSets/2017/test.txt").write_text("one")
    for t in range(1, FRAMES):
        (davis / f"Annotations/480p/one/{t:05}.png").unlink()
    assert run(goldens, davis, tmp_path / "out", split="test") is None
    assert (tmp_path / "out/one/00005.png").is_file()


@pytest.mark.parametrize(
    ("output", "sequence", "message"),
    [
        ("davis/Annotations/480p", "one", r"contains .*480p/one, a folder of the data set"),
        ("davis/JPEGImages/../JPEGImages/480p", "one", "a folder of the data set"),
        ("link", "one", "a folder of the data set"),
        ("out", "../480p/one", r"'../480p/one' would be written to .*, outside output=.*out: fix"),
    ],
)
def test_nothing_is_written_over_the_data_set(
    output: str, sequence: str, message: str, davis: Path, tmp_path: Path
) -> None:
    """Nor outside the output; weights are not looked for first."""
    (davis / "ImageSets/2017/val.txt").write_text(sequence)
    (tmp_path / "link").symlink_to(davis / "Annotations/480p")
    before = {path: path.read_bytes() for path in davis.rglob("*.*g")}
    with pytest.raises(UsageError, match=message):
        video_segmentation("/nowhere", davis, tmp_path / output)
    assert before == {path: path.read_bytes() for path in davis.rglob("*.*g")}
    assert not (tmp_path / "480p").exists()


def test_wrong_arguments(
    goldens: Path, davis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (davis / "Annotations/480p/two/00000.png").unlink()
    with pytest.raises(UsageError, match="sequence two lacks its first mask"):
        video_segmentation("/nowhere", davis, tmp_path / "out")
    (davis / "ImageSets/2017/val.txt").write_text("one")
    weights = str(goldens / "pth/backbone.pth")
    for side, message in ((60, "must be at least 64"), (100, "multiple of the patch size, 8")):
        with pytest.raises(UsageError, match=f"image_size={side} {message}|{message}"):
            video_segmentation(weights, davis, tmp_path / "out", image_size=side)
    _, info = dino_jax.load(weights)
    monkeypatch.setattr(backbone, "load", lambda *_, **__: (Tokenless(), info))
    with pytest.raises(UsageError, match=r"Tokenless does not give the tokens .*: use a ViT"):
        run(goldens, davis, tmp_path / "out")
