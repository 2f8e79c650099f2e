"""The sheet of queries and their neighbours."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.jobs.knn import check_report, draw_report
from dino_jax.visualize.neighbours_sheet import RIGHT, WRONG, neighbours_sheet


def count(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == color).all(axis=-1).sum())


def test_frame_colours_show_whether_classes_agree() -> None:
    test, train = open_source("shapes:20@test"), open_source("shapes:40@train")
    query, similarity = np.array([3]), np.full((1, 3), 0.5)
    same, other = np.array([[3, 13, 23]]), np.array([[4, 15, 26]])
    right = neighbours_sheet(test, train, query, same, similarity)
    wrong = neighbours_sheet(test, train, query, other, similarity)
    assert right.size == wrong.size
    assert count(right, RIGHT) == count(wrong, WRONG) > 3 * 4 * 100
    assert count(right, WRONG) == count(wrong, RIGHT) == 0


def test_report_of_two_passes(tmp_path: Path) -> None:
    """The features equal the class, so every neighbour is correct."""
    specs = ("shapes:60@train", "shapes:15@test")
    sources = tuple(map(open_source, specs))
    sides = []
    for source in sources:
        index = np.arange(len(source), dtype=np.int32)[::2]  # the other images are unreadable
        labels = source.labels[index]
        sides.append(Features(np.eye(10, dtype=np.float32)[labels], labels, index))
    path = tmp_path / "report.png"
    draw_report(path, sources, sides)
    with Image.open(path) as report:
        assert count(report, RIGHT) > 0
        assert count(report, WRONG) > 0
    again = tmp_path / "again.png"
    draw_report(again, sources, sides)
    assert again.read_bytes() == path.read_bytes()


def test_rejects_output_formats(tmp_path: Path) -> None:
    """Unknown formats, formats that can only be read, and formats without colours."""
    for name in ("x.txt", "x", "x.psd", "x.xbm"):
        with pytest.raises(UsageError, match=rf"report=.*{name} cannot be written as a picture"):
            check_report(tmp_path / name)
    for name in ("x.png", "x.JPG", "x.webp"):
        check_report(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written"):
        check_report(tmp_path / "file" / "x.png")
