"""The retrieval job on an Oxford of eight photographs in its true folder layout."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

import dino_jax
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.picture_pass import PicturePass
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.evaluate.retrieval.ranking import rank, score_ranking
from dino_jax.jobs import retrieval as retrieval_job
from dino_jax.jobs.retrieval import retrieval
from tests.support.photographs import photographs

IMAGES = [f"all_souls_{i:06}" for i in range(8)]
QUERIES = ["query_000000", "query_000001"]
TRUTH = [  # of query 0, a cat; of query 1, a temple
    {"bbx": [10.0, 5.0, 90.0, 80.0], "easy": [0, 1], "hard": np.array([2]), "junk": [3]},
    {"bbx": [0.0, 0.0, 60.0, 60.0], "easy": np.array([4]), "hard": [5], "junk": []},
]


@pytest.fixture(scope="module")
def oxford(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    cat, temple = photographs()["chelsea"], photographs()["china"]
    pictures = [
        cat.crop((10, 5, 230, 140)).resize((80, 60)),
        cat.crop((0, 10, 200, 150)).resize((90, 67)),
        cat.crop((80, 20, 160, 100)).resize((64, 64)),
        cat.crop((0, 0, 60, 50)).resize((80, 60)),
        temple.crop((5, 0, 235, 155)).resize((100, 75)),
        temple.crop((60, 10, 150, 120)).resize((60, 80)),
        photographs()["coffee"].resize((80, 60)),
        photographs()["rocket"].resize((64, 64)),
        cat.resize((80, 60)),
        temple.resize((80, 60)),
    ]
    for name, picture in zip((*IMAGES, *QUERIES), pictures, strict=True):
        picture.save(folder / "jpg" / f"{name}.jpg", quality=90)
    gnd = {"gnd": TRUTH, "imlist": IMAGES, "qimlist": QUERIES}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(gnd, 2))
    return folder


@pytest.fixture
def copy(oxford: Path, tmp_path: Path) -> Path:
    """Another one, to be spoilt."""
    return Path(shutil.copytree(oxford, tmp_path / "roxford5k"))


def run(goldens: Path, data: Path, output: Path, **settings: Any) -> dict[str, Any]:
    settings.setdefault("options", PassOptions(batch_size=8, num_threads=2))
    return retrieval(str(goldens / "pth/backbone.pth"), data, output=output, **settings)


def by_hand(goldens: Path, data: Path, side: int) -> dict[str, float]:
    """Pillow's thumbnails one by one through the model."""
    model, info = dino_jax.load(goldens / "pth/backbone.pth")
    features_of = jax.jit(lambda images: model(images))
    rows = []
    for name in (*IMAGES, *QUERIES):
        image = Image.open(data / "jpg" / f"{name}.jpg").convert("RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        pixels = (np.asarray(image, np.float32) / 255 - info.mean) / info.std
        rows.append(np.asarray(features_of(pixels[None].astype(np.float32))[0]))
    ranks = rank(np.stack(rows[:8]), np.stack(rows[8:]))
    truth = [{k: np.array(v, int) for k, v in t.items() if k != "bbx"} for t in TRUTH]
    return {
        p: 100 * score_ranking(ranks, truth, p).mean_average_precision for p in ("easy", "hard")
    }


def test_job_gives_what_single_pictures_give(
    goldens: Path, oxford: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    scores = run(goldens, oxford, output, image_size=48)
    for protocol, value in by_hand(goldens, oxford, 48).items():
        assert scores[protocol]["map"] == pytest.approx(value)
    assert scores["easy"]["mp_at_1"] == 100  # crops of one photograph, even for random weights
    result = json.loads(output.read_text())
    assert result["job"] == "retrieval"
    assert result["metrics"] == {"retrieval": scores, "unreadable_images": []}
    assert result["settings"]["image_size"] == 48
    assert result["settings"]["multiscale"] is False
    assert len(result["weights"]["sha256"]) == 64
    shown = capsys.readouterr().out
    assert "mP@10" in shown
    assert f"{scores['medium']['map']:.2f}" in shown


def test_presets_are_the_papers_and_can_be_changed(
    goldens: Path, oxford: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).standard_normal((10, 4))
    found = Features(rows, np.full(10, -1), np.arange(10))
    monkeypatch.setattr(retrieval_job, "_features", lambda *_, **seen: found)
    output = tmp_path / "r.json"
    for changes, expected in (
        ({}, (224, False)),
        ({"preset": "paper-oxford", "multiscale": True}, (224, True)),
        ({"preset": "paper-paris"}, (512, True)),
        ({"preset": "paper-paris", "image_size": 300, "multiscale": False}, (300, False)),
    ):
        run(goldens, oxford, output, **changes)
        settings = json.loads(output.read_text())["settings"]
        assert (settings["image_size"], settings["multiscale"]) == expected


def test_the_data_set_chooses_its_preset(
    goldens: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Features(np.eye(10), np.full(10, -1), np.arange(10))
    monkeypatch.setattr(retrieval_job, "_features", lambda *_, **seen: found)
    (copy / "gnd_roxford5k.pkl").rename(copy / "gnd_rparis6k.pkl")
    output = tmp_path / "r.json"
    for preset, side, chosen in ((None, 512, "paper-paris"), ("paper-oxford", 224, "paper-oxford")):
        run(goldens, copy, output, preset=preset)
        settings = json.loads(output.read_text())["settings"]
        assert (settings["image_size"], settings["preset"]) == (side, chosen)


def test_broken_pictures_are_named_and_left_out(
    goldens: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the database, which is then junk, and a query, which then finds nothing."""
    broken = [copy / "jpg" / f"{name}.jpg" for name in (IMAGES[2], QUERIES[1])]
    broken[0].write_text("<html>not found")
    broken[1].write_bytes(broken[1].read_bytes()[:1500])
    output = tmp_path / "results.json"
    settings = {"image_size": 32, "multiscale": True}
    settings |= {"cache": FeatureCache(save_features=tmp_path / "store")}
    scores = run(goldens, copy, output, **settings)
    with mock.patch.object(PicturePass, "stream", side_effect=AssertionError("computed")):
        assert run(goldens, copy, output, **settings) == scores  # at once
        with pytest.raises(AssertionError, match="computed"):
            run(goldens, copy, output, **settings | {"multiscale": False})
    assert json.loads(output.read_text())["metrics"]["unreadable_images"] == list(map(str, broken))
    assert "skipped: 2" in capsys.readouterr().out
    assert scores["hard"] == {"map": None, "mp_at_1": None, "mp_at_5": None, "mp_at_10": None}
    assert scores["easy"]["mp_at_1"] == 100


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "gnd_roxford5k.pkl"
    gnd = pickle.loads(path.read_bytes())
    change(gnd)
    path.write_bytes(pickle.dumps(gnd))


class Code:
    """Pickles as a call."""

    def __reduce__(self) -> tuple:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda gnd: gnd["imlist"].append("gone"),
            r"1 of 11 images are missing in .*jpg: gone\.jpg",
        ),
        (
            lambda gnd: gnd.update(imlist=Code()),
            r"asks for '(__builtin__|builtins)\.print'.*nothing",
        ),
        (lambda gnd: gnd.pop("qimlist"), "has no 'qimlist': use the list of a revisited"),
        (lambda gnd: gnd["gnd"][0].pop("hard"), "has no 'hard': use the list of a revisited"),
        (lambda gnd: gnd["gnd"].pop(), "2 queries and 1 ground truths"),
        (lambda gnd: gnd["gnd"][1].update(junk=[8]), "'junk' has indices beyond the 8 images"),
        (lambda gnd: gnd["gnd"][1].update(easy=["a"]), "'easy' is not a list of integers"),
        (lambda gnd: gnd.update(imlist=[1]), "names of its images are not a list"),
    ],
)
def test_wrong_lists_are_named_before_any_weights_are_read(
    change: Any, message: str, copy: Path, tmp_path: Path
) -> None:
    rewrite(copy, change)
    with pytest.raises(UsageError, match=message):
        retrieval("/nowhere", copy, output=tmp_path / "r.json")


def test_wrong_arguments(goldens: Path, oxford: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    with pytest.raises(UsageError, match=r"must contain one list gnd_\*\.pkl.*contains no list"):
        run(goldens, oxford / "jpg", output)
    with pytest.raises(UsageError, match="image_size=0 must be at least 1"):
        run(goldens, oxford, output, image_size=0)
    with pytest.raises(UsageError, match=r"all_souls_000000\.jpg is 9x7 pixels.*patch of 8"):
        run(goldens, oxford, output, image_size=9)
