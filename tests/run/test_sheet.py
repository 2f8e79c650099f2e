"""The attention sheet that a run draws when it ends."""

from pathlib import Path

import jax
import pytest
from flax import nnx
from PIL import Image

from dino_jax import sharding
from dino_jax.config.build import model_spec
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.models.network import split
from dino_jax.run import sheet
from dino_jax.run.sheet import RunSheet
from dino_jax.visualize.sheet import TILE
from tests.support import runs


def test_draws_a_row_for_each_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are sharded over eight devices."""
    monkeypatch.setattr(sheet, "SIZE", (32, 32))
    config = runs.tiny_config(log__attention_sheet=3, model__overrides__embed_dim=64)
    mesh, train = sharding.make_mesh(), open_source("shapes:85@train")
    path = tmp_path / "attention.png"
    _, params, stats = split(nnx.jit(lambda: model_spec(config).model(nnx.Rngs(0)))())
    layout = sharding.state_shardings(params, mesh, "fsdp")
    assert not all(s.is_fully_replicated for s in jax.tree.leaves(layout))
    RunSheet(config, model_spec(config), train, mesh)(jax.device_put(params, layout), stats, path)
    with Image.open(path) as picture:
        side = TILE * 3 // 4  # image, masks, mean and two heads
        assert 5 * side < picture.width < 6 * side
        assert 3 * side < picture.height < 5 * side
        assert len(picture.getcolors(1 << 24)) > 50


def test_pictures_come_from_the_test_source() -> None:
    mesh, train = sharding.make_mesh(), open_source("shapes:85@train")
    config = runs.tiny_config(log__attention_sheet=3, eval__knn_test="/no/where")
    with pytest.raises(UsageError, match="/no/where is not a folder"):
        RunSheet(config, model_spec(config), train, mesh)
    config = runs.tiny_config(log__attention_sheet=3, eval__knn_test="none")
    RunSheet(config, model_spec(config), train, mesh)


def test_rejects_a_network_without_attention() -> None:
    config = runs.tiny_config(log__attention_sheet=3)
    config.model.name, config.model.patch_size, config.model.drop_path_rate = "resnet18", None, 0.0
    for key in config.model.overrides:
        config.model.overrides[key] = None
    with pytest.raises(UsageError, match=r"attention_sheet=3: resnet18 is a ResNet, which"):
        RunSheet(config, model_spec(config), open_source("shapes:85@train"), sharding.make_mesh())
