"""The first state of a run."""

import jax
import numpy as np

from dino_jax.run.start import with_center
from tests.support.starts import BACKBONE, batch_of, fixture_config, start


def test_a_missing_center_is_computed_and_another_kept() -> None:
    config = fixture_config(BACKBONE)
    begin, _, plan = start(config)
    assert not begin.has_center
    assert not np.any(begin.state.center)
    state = with_center(begin, plan, batch_of(config))
    assert np.abs(state.center).max() > 0.01
    for ours, theirs in zip(
        jax.tree.leaves(state.replace(center=None)),
        jax.tree.leaves(begin.state.replace(center=None)),
        strict=True,
    ):
        assert ours is theirs
    kept = begin._replace(has_center=True)
    assert with_center(kept, plan, batch_of(config)) is kept.state
