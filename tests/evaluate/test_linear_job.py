"""The linear probe from weights of the reference to its files."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

import runs
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate import linear_training
from dino_jax.evaluate.extraction import Extraction, Extractor
from dino_jax.evaluate.linear_files import LinearHead, read_head, write_head
from dino_jax.evaluate.linear_job import linear, probed_feature
from dino_jax.evaluate.tokens import ClassToken, ClassTokens
from torch_files import storage, tensor, zip_file

OPTIONS = Extraction(resize=16, crop=16, canvas_size=32, batch_size=32, num_threads=2)
TRAIN = {"train": "shapes:80@train", "epochs": 4, "train_batch_size": 32, "options": OPTIONS}
TEST = "shapes:40@test"
RATES = (0.01, 1.0)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def weights(goldens: Path) -> str:
    return str(goldens / "pth/backbone.pth")


@pytest.fixture(scope="module")
def trained(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    linear(weights, TEST, workdir=workdir, learning_rates=RATES, **TRAIN)
    return workdir


def result(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def test_it_learns_and_says_how(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
    assert log[0]["train_lr"] == pytest.approx([rate * 32 / 256 for rate in RATES])
    slow, quick = zip(*(record["train_loss"] for record in log), strict=True)
    assert abs(slow[0] - np.log(10)) < 0.3
    assert min(quick) < slow[-1] - 0.1
    metrics = result(trained)["metrics"]
    tops = np.array([record["test_top1"] for record in log])
    assert metrics["top1"] == tops.max()
    assert metrics["chosen_on"] == "test images"
    epoch, rate = np.unravel_index(tops.argmax(), tops.shape)
    assert (metrics["epoch"], metrics["learning_rate"]) == (epoch, RATES[rate])
    assert metrics["top5"] == log[epoch]["test_top5"][rate]
    assert [row["learning_rate"] for row in metrics["learning_rates"]] == list(RATES)
    assert result(trained)["settings"]["feature"] == repr(ClassTokens(2))


def test_a_rate_alone_learns_the_same(weights: str, trained: Path, tmp_path: Path) -> None:
    linear(weights, TEST, workdir=tmp_path, learning_rates=RATES[1:], **TRAIN)
    beside, alone = (
        [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        for folder in (trained, tmp_path)
    )
    np.testing.assert_allclose(
        [record["train_loss"][1] for record in beside],
        [record["train_loss"][0] for record in alone],
        rtol=1e-4,
    )


def test_a_stopped_training_continues_to_the_same_bits(
    weights: str, trained: Path, tmp_path: Path
) -> None:
    arguments = {"workdir": tmp_path, "learning_rates": RATES} | TRAIN
    write = linear_training._write

    def killed(workdir: Path, settings: Any, progress: Any) -> None:
        write(workdir, settings, progress)
        if len(progress.history) == 2:
            raise KeyboardInterrupt

    with mock.patch.object(linear_training, "_write", killed), pytest.raises(KeyboardInterrupt):
        linear(weights, TEST, **arguments)
    with pytest.raises(UsageError, match=r"holds a training with epochs=4 \(here 9\): give ano"):
        linear(weights, TEST, **arguments | {"epochs": 9})
    linear(weights, TEST, **arguments)
    assert (tmp_path / "log.txt").read_bytes() == (trained / "log.txt").read_bytes()
    for name in ("head.npz", "progress.npz"):
        with np.load(tmp_path / name) as ours, np.load(trained / name) as theirs:
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key])
    with mock.patch.object(linear_training, "train_step", side_effect=AssertionError("trained")):
        linear(weights, TEST, **arguments)  # nothing is left to do


def test_the_kept_head_scores_the_same(weights: str, trained: Path, tmp_path: Path) -> None:
    head = str(trained / "head.npz")
    found = linear(weights, TEST, evaluate=head, workdir=tmp_path, options=OPTIONS)
    expected = result(trained)["metrics"]
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])


def test_the_rate_may_be_chosen_on_held_out_images(weights: str, tmp_path: Path) -> None:
    arguments = TRAIN | {"epochs": 2, "hold_out": 0.25}
    found = linear(weights, TEST, workdir=tmp_path, learning_rates=RATES, **arguments)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    held_out = np.array([record["held_out_top1"] for record in log])
    epoch, rate = np.unravel_index(held_out.argmax(), held_out.shape)
    assert found["chosen_on"] == "training images held out"
    assert found["top1"] == log[epoch]["test_top1"][rate]
    assert (held_out * 20 / 100 == np.round(held_out * 20 / 100)).all()  # of 20 images


def torch_head(kernel: np.ndarray) -> bytes:
    """A file as the reference saves a linear classifier [F, C] without bias."""
    width, num_classes = kernel.shape
    weight = tensor(storage(kernel.size), 0, (num_classes, width), (width, 1))
    bias = tensor(storage(num_classes, "Float", "1"), 0, (num_classes,), (1,))
    names = {"module.linear.weight": weight, "module.linear.bias": bias}
    data = {"0": kernel.T.astype(np.float32).tobytes(), "1": bytes(4 * num_classes)}
    return zip_file({"epoch": 100, "state_dict": names}, data)


def test_a_head_of_the_reference(weights: str, tmp_path: Path) -> None:
    """Its classes are those of the folders in sorted order."""
    for i, name in enumerate(("ant", "bee", "cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(5):
            color = (50 * i + j, 255 - 60 * i, 20 * j)
            Image.new("RGB", (16, 16), color).save(tmp_path / "images" / name / f"{j}.png")
    kernel = np.random.default_rng(0).standard_normal((96, 4))
    head = str(tmp_path / "head.pth")
    Path(head).write_bytes(torch_head(kernel))
    images, arguments = str(tmp_path / "images"), {"workdir": tmp_path, "options": OPTIONS}
    found = linear(weights, images, evaluate=head, **arguments)
    extractor = Extractor(weights, OPTIONS)
    (side,) = extractor.features(ClassTokens(2), [open_source(images)])
    hits = (side.features @ kernel).argmax(axis=1) == side.labels
    assert found["top1"] == pytest.approx(100 * hits.mean())
    with pytest.raises(UsageError, match=r"knows 4 classes, shapes:40@test has 10: give a head"):
        linear(weights, TEST, evaluate=head, **arguments)
    with pytest.raises(UsageError, match=r"takes 96 features .* has 48: set n_last_blocks"):
        linear(weights, images, evaluate=head, n_last_blocks=1, **arguments)


def test_a_head_by_its_hub_name(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth"
    file.parent.mkdir()
    file.write_bytes((goldens / "pth/linear.pth").read_bytes())
    monkeypatch.setenv("DINO_JAX_HUB", str(tmp_path))
    found, expected = read_head("dino_vits16"), read_head(str(goldens / "pth/linear.pth"))
    np.testing.assert_array_equal(found.kernel, expected.kernel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "e" * 64}, r"was trained on weights eeeeeeeeeeee\.\.\., not on"),
        ({"feature": "ClassToken()"}, r"takes 96 features \(ClassToken\(\)\), but ClassTokens"),
        ({"class_names": ("circle", "dog")}, "has classes that evaluate=.* does not know"),
    ],
)
def test_a_head_of_something_else(
    change: dict[str, Any], message: str, weights: str, tmp_path: Path
) -> None:
    head = LinearHead(np.zeros((96, 10), np.float32), np.zeros(10, np.float32), **change)
    write_head(tmp_path / "head.npz", head)
    with pytest.raises(UsageError, match=message):
        linear(
            weights, TEST, evaluate=str(tmp_path / "head.npz"), workdir=tmp_path, options=OPTIONS
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": None}, "either train=SOURCE .* or evaluate=HEAD"),
        ({"learning_rates": (0.1, 0.0)}, r"learning_rates=\(0.1, 0.0\) must be"),
        ({"hold_out": 1.0}, "hold_out=1.0 must be at least 0 and below 1"),
        ({"epochs": 0}, "epochs=0 and train_batch_size=32 must be at least 1"),
        ({"train_batch_size": 96}, "train_batch_size=96 is more than the 80 images"),
        ({"train_batch_size": 36}, "train_batch_size=36 is no multiple of the 8 devices"),
        ({"n_last_blocks": 9}, "n=9 blocks asked for: choose 1 to 2"),
        ({"evaluate": "/nowhere.npz", "train": None}, "evaluate=/nowhere.npz: there is no such"),
        ({"evaluate": "WEIGHTS", "train": None}, "is a backbone, not a linear classifier"),
    ],
)
def test_wrong_arguments(
    changes: dict[str, Any], message: str, weights: str, tmp_path: Path
) -> None:
    if changes.get("evaluate") == "WEIGHTS":
        changes = changes | {"evaluate": weights}
    with pytest.raises(UsageError, match=message):
        linear(weights, TEST, **{"workdir": tmp_path} | TRAIN | changes)


def test_replaced_images_are_counted_once(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a training that went on: the images of both parts together."""
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(path)
        if i in (4, 9, 13):
            path.write_text("no picture")
    arguments = {"train": str(tmp_path / "images"), "workdir": tmp_path, "learning_rates": RATES}
    arguments |= {"epochs": 3, "train_batch_size": 24, "options": OPTIONS}
    write = linear_training._write

    def killed(workdir: Path, settings: Any, progress: Any) -> None:
        write(workdir, settings, progress)
        raise KeyboardInterrupt

    with mock.patch.object(linear_training, "_write", killed), pytest.raises(KeyboardInterrupt):
        linear(weights, arguments["train"], **arguments)
    for _ in range(2):  # it goes on; then nothing is left to do
        metrics = linear(weights, arguments["train"], **arguments)
        assert metrics["replaced_training_images"] == 3
        shown = capsys.readouterr().out
        assert f"images of folder:{tmp_path}/images that cannot be read and were replaced" in shown
    assert result(tmp_path)["metrics"]["unreadable_images"] == {f"folder:{tmp_path}/images": 3}


def test_files_of_something_else_are_no_heads(weights: str, trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros((96, 10)))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "list.npz", about="[1]", kernel=np.zeros((96, 10)), bias=np.zeros(10))
    for path in (trained / "progress.npz", tmp_path / "array.npz", tmp_path / "list.npz"):
        with pytest.raises(
            UsageError, match=rf"evaluate={path} is damaged or no file of this job's: give a head"
        ):
            linear(weights, TEST, evaluate=str(path), workdir=tmp_path, options=OPTIONS)


def test_damaged_files_are_named(weights: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "progress.npz").write_bytes((trained / "progress.npz").read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"progress.npz is damaged or no file of this job's"):
        linear(weights, TEST, workdir=tmp_path, learning_rates=RATES, **TRAIN)


def test_the_feature_is_the_papers() -> None:
    vit = {"blocks": [None] * 12, "get_intermediate_layers": None}
    small, base = mock.Mock(embed_dim=384, **vit), mock.Mock(embed_dim=768, **vit)
    resnet = mock.Mock(spec=["embed_dim"])
    assert probed_feature(small, None, None) == ClassTokens(4)
    assert probed_feature(base, None, None) == ClassTokens(1, avgpool_patchtokens=True)
    assert probed_feature(base, 4, None) == ClassTokens(4)
    assert probed_feature(small, None, True) == ClassTokens(1, avgpool_patchtokens=True)
    assert probed_feature(resnet, None, None) == ClassToken()


def test_the_step_needs_no_gradient_of_the_backbone(weights: str) -> None:
    """Its time is one forward pass: no dot product of the backbone's backward pass is there."""
    extractor = Extractor(weights, OPTIONS)
    step = linear_training.compile_step(extractor, ClassTokens(1), seed=0)
    probe = jax.eval_shape(lambda: linear_training.new_probe(jax.random.key(0), 2, 48, 10))
    batch = {
        "canvas": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8),
        "size": jax.ShapeDtypeStruct((8, 2), np.int32),
        "index": jax.ShapeDtypeStruct((8,), np.int32),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
    }
    rates = jax.ShapeDtypeStruct((2,), np.float32)
    text = step.lower(probe, extractor.weights, batch, 0, rates).as_text()
    forward = jax.jit(lambda x: extractor.model.get_intermediate_layers(x, 1)).lower(
        jax.ShapeDtypeStruct((8, 16, 16, 3), np.float32)
    )
    extra = text.count("dot_general") - forward.as_text().count("dot_general")
    assert extra <= 2 + 2 + 2  # crops (rows, columns, on two platforms), logits and their gradient
