"""The center of a run that starts from weights without a center."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dino_jax
from dino_jax.models.network import split
from dino_jax.weights.layouts.mapping import to_torch
from tests.support import runs
from tests.support.starts import BACKBONE, MADE, ONE_NETWORK, batch_of, fixture_config, start
from tests.support.torch_files import save


@pytest.mark.parametrize("devices", [1, 8])
def test_center_is_the_mean_of_the_teachers_logits(devices: int) -> None:
    config = fixture_config(BACKBONE)
    (state, *_), _, plan = start(config, devices)
    batch = batch_of(config)
    center = plan.compute_center(state, batch)
    assert center.shape == state.center.shape
    (globals_, *_), _ = jax.jit(plan.step.make_views)(batch, jnp.zeros((), jnp.int32))
    assert globals_.shape[:2] == (config.train.batch_size, 2)
    logits, _ = jax.jit(plan.step.network)(
        state.teacher_params, state.teacher_batch_stats, (globals_,)
    )
    expected = np.asarray(logits).mean((0, 1))
    np.testing.assert_allclose(center[0], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.01


def test_run_from_a_backbone_can_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run logs what it loaded. To resume, it no longer needs these weights."""
    model, _ = dino_jax.load(runs.whole())
    path = save(tmp_path / "backbone.pth", to_torch(*split(model)[1:], "vit"))
    config = runs.tiny_config(init_from=path)
    workdir = tmp_path / "run"
    assert runs.train_here(config, workdir, stop_after=4)["step"] == 4
    output = capsys.readouterr()
    for note in (f"starting from {path}", ONE_NETWORK, MADE):
        assert f"note: {note}" in output.out + output.err
    path.unlink()
    assert runs.train_here(config, workdir)["finished"]
    assert np.any(runs.arrays(workdir)["training['center']"])
    assert runs.train_here(runs.tiny_config(), workdir)["finished"]  # init_from may be left out
