"""Drawing a run's learning curve."""

import math
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UsageError
from dino_jax.run.learning_curve import plot_learning_curve
from tests.support.run_logs import open_log, records, scalars, train


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures in the order in which they were saved."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def record(self: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return figures


def test_learning_curve_shows_the_logged_values(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    train(tmp_path)
    (figure,) = drawn
    labels = ["loss (nats)", "learning rate", "KL(teacher || student) (nats)", "k-NN top-1 (%)"]
    assert [axis.get_ylabel() for axis in figure.axes] == labels
    assert {axis.get_xlabel() for axis in figure.axes} == {"epoch"}
    intervals, epochs = figure.axes[0].lines
    logged = records(tmp_path / "metrics.jsonl")[1:]
    np.testing.assert_array_equal(intervals.get_xdata(), [r["step"] / 10 for r in logged])
    np.testing.assert_array_equal(intervals.get_ydata(), [r["loss"] for r in logged])
    np.testing.assert_array_equal(epochs.get_xdata(), [0.5, 1.5, 2.5, 3.5])
    (knn,) = figure.axes[-1].lines
    assert (list(knn.get_xdata()), list(knn.get_ydata())) == ([0, 2, 4], [40, 70, 90])
    with Image.open(tmp_path / "learning_curve.png") as picture:
        assert min(picture.size) > 500


def test_learning_curve_with_nan_and_infinities(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    with open_log(tmp_path) as log:
        for step, loss in ((4, 6.0), (8, math.nan), (10, 5.0)):
            values = {"loss": loss, "lr": 0.1, "kl": math.inf}
            log.interval(step, values, seconds=1.0, data_seconds=0.0)
        log.epoch(0, {"loss": math.nan, "lr": 0.1})
    loss, lr, kl = drawn[0].axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [6.0, math.nan, 5.0])
    assert lr.lines[1].get_marker() == "o"  # a single point has no line
    assert [text.get_text() for text in kl.texts] == ["no finite value"]
    assert not loss.texts


def test_learning_curve_of_the_untrained_network_only(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.scores(0, {20: {"top1": 40.0, "top5": 80.0}})
    expected = {"step": 0, "epoch": 0.0, "knn_20_top1": 40.0, "knn_20_top5": 80.0}
    assert records(tmp_path / "metrics.jsonl") == [expected]
    assert scalars(tmp_path)["epoch/knn_20_top1", 0] == 40.0
    assert (tmp_path / "learning_curve.png").exists()


def test_learning_curve_with_an_incomplete_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "epoch": 0.5, "loss": 6.0}\n{"step": 6,')
    assert plot_learning_curve(tmp_path) == tmp_path / "learning_curve.png"
    assert (tmp_path / "learning_curve.png").exists()


def test_no_learning_curve_without_records(tmp_path: Path) -> None:
    with open_log(tmp_path):
        pass
    assert not (tmp_path / "learning_curve.png").exists()
    with pytest.raises(UsageError, match="trained for at least one interval"):
        plot_learning_curve(tmp_path)
