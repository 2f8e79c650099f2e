"""Every config is valid, and `:debug` shrinks it."""

from pathlib import Path

import pytest
from flax import nnx

from configs import fashion_mnist
from dino_jax.config import build, checks
from dino_jax.config.file import read_config
from dino_jax.data.sources import open_source
from tests.support import runs

CONFIGS = sorted((runs.ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_passes_the_checks(path: Path) -> None:
    config = read_config(str(path))
    config.data.train = config.data.train or "folder:/somewhere"
    checks.check(config, num_devices=8)
    assert f"--config=configs/{path.name}" in path.read_text()  # its launch command


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_debug_is_small(path: Path) -> None:
    """All configs shrink to the same data, and ViTs to one network; test_train runs each kind."""
    config, small = read_config(f"{path}:debug"), read_config(runs.CONFIG)
    checks.check(config, num_devices=8)
    if config.model.name.startswith("vit"):
        assert config.model.overrides == small.model.overrides
        assert config.model.patch_size == small.model.patch_size
    else:
        backbone = nnx.eval_shape(lambda: build.model_spec(config).backbone(nnx.Rngs(0)))
        assert (backbone.family, backbone.embed_dim) in (("xcit", 48), ("resnet", 512))
    for section in ("train", "data", "eval"):
        different = {k for k in small[section] if config[section][k] != small[section][k]}
        assert different <= {"sharding", "max_unreadable", "knn_at_start", "knn_temperature"}
    assert len(open_source(config.data.train)) // config.train.batch_size >= 1


def test_fashion_mnist_reads_debians_package_or_tfds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", Path("/nowhere"))
    assert fashion_mnist.get_config().data.train == "tfds:fashion_mnist@train"
    monkeypatch.setattr(fashion_mnist, "DEBIAN", runs.ROOT)
    assert fashion_mnist.get_config().data.train == f"idx:{runs.ROOT}@train"
