"""Reading config files and overriding their keys."""

from pathlib import Path

import pytest

from dino_jax.config.file import override, read_config
from dino_jax.errors import UsageError
from tests.support import runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            "config=.*config.py is neither a Python file nor one of the package's configs: choose",
        ),
        ("def get_config(:", r"raises SyntaxError: .*line 1\); fix the file"),
        ("\nimport not_there", "config.py, line 2 raises ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 3", "get_config returns 3, not a ConfigDict"),
    ],
)
def test_rejects_config_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(str(tmp_path / "config.py"))


def test_rejects_config_argument() -> None:
    with pytest.raises(UsageError, match="unknown config argument 'foo': use 'debug'"):
        read_config(f"{runs.ROOT}/configs/default.py:foo")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("workdir", "unknown argument 'workdir': settings are --config.SECTION.KEY=VALUE"),
        ("--config.optim.lr", "--config.optim.lr has no value: write --config.optim.lr=VALUE"),
        ("--config.lr=1", r"unknown setting 'lr': did you mean optim.lr\?"),
        (
            "--config.optim=1",
            "unknown setting 'optim': it is a section; its keys are optim.acc",
        ),
        ("--config.zzzzz=1", "unknown setting 'zzzzz': configs/default.py describes every key"),
        ("--config.train.epochs=none", "train.epochs=none must be a whole number"),
        ("--config.head.use_bn=yes", "head.use_bn=yes must be true or false, such as False"),
        ("--config.eval.knn_ks=10,x", "eval.knn_ks=10,x must be numbers separated by commas"),
        ("--config.model.overrides.depth=1.5", "depth=1.5 must be a whole number, such as 2"),
    ],
)
def test_rejects_arguments(argument: str, message: str) -> None:
    config = read_config(runs.CONFIG)
    with pytest.raises(UsageError, match=message):
        override(config, [argument])


def test_sets_values_of_every_type() -> None:
    config = read_config(runs.CONFIG)
    override(
        config,
        [
            "--config.optim.lr=1",
            "--config.train.epochs",
            "7",
            "--config.head.use_bn=True",
            "--config.crops.global_scale=(0.2, 1)",
            "--config.eval.knn_ks=20",
            "--config.data.train=/a folder/with=signs",
            "--config.eval.knn_train=none",
            "--config.optim.lr=0.5",
        ],
    )
    assert (config.optim.lr, config.train.epochs, config.head.use_bn) == (0.5, 7, True)
    assert (config.crops.global_scale, config.eval.knn_ks) == ((0.2, 1), (20,))
    assert (config.data.train, config.eval.knn_train) == ("/a folder/with=signs", None)


def test_reads_a_config_by_name() -> None:
    by_path = read_config(f"{runs.ROOT}/configs/vit_small.py:debug")
    assert read_config("vit_small:debug").to_json() == by_path.to_json()
