"""Trained linear classifiers: from this job, from the reference, and mismatched ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.sources import open_source
from dino_jax.data.sources.idx import IdxSource
from dino_jax.errors import UsageError
from dino_jax.evaluate.classification.linear_head import check_head
from dino_jax.evaluate.features.extractor import Extractor
from dino_jax.evaluate.features.tokens import ClassTokens
from dino_jax.jobs.linear import linear
from dino_jax.weights.linear import LinearHead, read_head, write_head
from tests.support.linear_setup import OPTIONS, TEST
from tests.support.torch_files import storage, tensor, zip_file


def torch_head(kernel: np.ndarray) -> bytes:
    """Writes a linear classifier [F, C] without bias in the format of the reference."""
    width, num_classes = kernel.shape
    weight = tensor(storage(kernel.size), 0, (num_classes, width), (width, 1))
    bias = tensor(storage(num_classes, "Float", "1"), 0, (num_classes,), (1,))
    names = {"module.linear.weight": weight, "module.linear.bias": bias}
    data = {"0": kernel.T.astype(np.float32).tobytes(), "1": bytes(4 * num_classes)}
    return zip_file({"epoch": 100, "state_dict": names}, data)


def test_head_of_the_reference(weights: str, tmp_path: Path) -> None:
    """Its classes are the folder names in sorted order."""
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
    with pytest.raises(UsageError, match=r"has 4 classes, but shapes:40@test has 10: use a"):
        linear(weights, TEST, evaluate=head, **arguments)
    with pytest.raises(UsageError, match=r"expects 96 features .* has 48: set n_last_blocks"):
        linear(weights, images, evaluate=head, n_last_blocks=1, **arguments)


def test_slice_of_images_without_class_names(weights: str) -> None:
    """The slice contains few class numbers, all of which the head must know."""
    extractor = Extractor(weights, OPTIONS)
    head = LinearHead(np.zeros((96, 10), np.float32), np.zeros(10, np.float32))

    def check(labels: list[int]) -> None:
        images = np.zeros((len(labels), 8, 8), np.uint8)
        source = IdxSource(images, np.array(labels), "idx:x@test[1:4]")
        check_head(head, "head.npz", extractor.info, ClassTokens(2), 96, source)

    check([2, 0, 1])
    check([9])
    with pytest.raises(UsageError, match=r"has 10 classes, but idx:x@test\[1:4\] has 11: use"):
        check([2, 10])


def test_head_from_the_hub(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ({"feature": "ClassToken()"}, r"expects 96 features \(ClassToken\(\)\), but ClassTokens"),
        ({"class_names": ("circle", "dog")}, "has classes that evaluate=.* was not trained on"),
    ],
)
def test_rejects_a_mismatched_head(
    change: dict[str, Any], message: str, weights: str, tmp_path: Path
) -> None:
    head = LinearHead(np.zeros((96, 10), np.float32), np.zeros(10, np.float32), **change)
    write_head(tmp_path / "head.npz", head)
    with pytest.raises(UsageError, match=message):
        linear(
            weights, TEST, evaluate=str(tmp_path / "head.npz"), workdir=tmp_path, options=OPTIONS
        )
