"""Reading config files and overriding their keys."""

import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dino_jax import train
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
        ("\nimport not_there", "config.py: line 2 raises ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 3", "the config is 3, not a ConfigDict: fix it"),
        ("import sys\nsys.exit()", "config.py: line 2 raises SystemExit: ; fix the file"),
        ("import sys\nsys.exit(3)", "config.py: line 2 raises SystemExit: 3; fix the file"),
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


# Files of users, which start from `configs.default` unless they define everything themselves

START = """
from configs import default, quickstart
from ml_collections import ConfigDict, FrozenConfigDict, config_dict
from pathlib import Path
import numpy as np
def get_config(arg=""):
    config = default.get_config("debug")
    {}
    return config
"""


def read_file(folder: Path, change: str) -> ConfigDict:
    """Reads a file that applies a change, a line of Python, to the small default config."""
    (folder / "mine.py").write_text(START.replace("{}", change))
    return read_config(str(folder / "mine.py"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("config.optim.learning_rate = 1.0", "unknown setting 'optim.learning_rate': the keys of"),
        ("config.crops.global_sise = 48", r"'crops.global_sise': did you mean crops.global_size"),
        ("config.train.update(epoch=77)", r"'train.epoch': did you mean train.epochs\?"),
        ("config.model.overrides.embed_dims = 3", "did you mean model.overrides.embed_dim"),
        ("config.lr = 1.0", r"unknown setting 'lr': did you mean optim.lr\?"),
        ("config.otpim = ConfigDict()", "unknown setting 'otpim': "),
        ("config.optim.adam = ConfigDict({'b1': 0.9})", "unknown setting 'optim.adam'"),
        ("config.sed = 1; config.optim.rl = 1", "'optim.rl'.*; unknown setting 'sed'"),
        ("del config.optim.lr", "missing settings optim.lr: start from default.get_config"),
        ("del config.loss", "missing settings loss: start from default.get_config"),
        ("config.model.overrides = ConfigDict()", "missing settings model.overrides.depth, "),
        ("del config.loss; config.loss = 3", "loss=3 must be a section; its keys are loss.cent"),
        ("del config.head; config.head = None", "head=None must be a section; "),
        (
            "del config.seed; config.seed = ConfigDict()",
            "seed is a section, but must be a",
        ),
        (
            "del config.optim.lr; config.optim.lr = 'x'",
            "optim.lr is .x., but must be",
        ),
        ("config.optim.lr = 'x'", "line 8 raises TypeError: .*; fix the file"),
        (
            "del config.seed; config.seed = 1.5",
            "seed is 1.5, but must be a whole number",
        ),
        ("del config.seed; config.seed = True", "seed is True, but must be a whole number"),
        ("del config.seed; config.seed = None", "seed is None, but must be a whole number"),
        ("del config.data.train; config.data.train = 3", "data.train is 3, but must be text"),
        (
            "del config.head.use_bn; config.head.use_bn = 1",
            "use_bn is 1, but must be true",
        ),
        (
            "config.eval.knn_ks = ('a',)",
            "eval.knn_ks is .'a',., but must be numbers sep",
        ),
        ("config = 3", "the config is 3, not a ConfigDict: fix it"),
        ("config = {'optim.lr': 1}", "the config is not a valid ConfigDict "),
        ("config = config.to_dict(); config[3] = 4", "the config is not a valid ConfigDict "),
        ("config = config.to_dict(); config['optim'][3] = 4", "is not a valid ConfigDict "),
        ("config = config.to_dict(); config['loss'] = None", "loss=None must be a section; "),
        (
            "del config.data.train; config.data.train = config_dict.required_placeholder(str)",
            r"is not a valid ConfigDict \(None value found in required reference\): fix it",
        ),
        ("config = {}", "missing settings checkpoint, .* and 7 more: "),
        (
            "from configs import mine",
            "`configs` is the package of dino_jax, which contains default",
        ),
        ("import configs.mine", "`configs` is the package of dino_jax, .* rename your own package"),
    ],
)
def test_rejects_configs_of_users(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"config={tmp_path}/mine.py: .*{message}"):
        read_file(tmp_path, change)


@pytest.mark.parametrize(
    "change",
    [
        "config = config.to_dict()",
        "config = FrozenConfigDict(config)",
        "config.lock()",
        "config.eval.knn_ks = [10, 20]",
        "config = config.to_dict(); config['data']['train'] = Path('shapes:256@train')",
        "del config.optim.lr; config.optim.lr = 1",
        "del config.optim.lr; config.optim.lr = np.float32(1)",
        "del config.seed; config.seed = np.int64(0)",
        "config.crops.update(blur_radius=(np.float64(0.1), np.float32(2)))",
    ],
)
def test_accepts_equal_values_of_other_types(change: str, tmp_path: Path) -> None:
    config, expected = read_file(tmp_path, change), read_config(runs.CONFIG)
    if "optim.lr" in change:
        expected.optim.lr = 1.0
    assert config.to_dict() == expected.to_dict()
    assert json.loads(config.to_json()) == json.loads(expected.to_json())
    override(config, ["--config.optim.lr=0.5", "--config.model.patch_size=none"])
    assert (config.optim.lr, config.model.patch_size) == (0.5, None)


def test_runs_check_configs_of_the_calling_program(tmp_path: Path) -> None:
    config = runs.tiny_config()
    config.optim.learning_rate = 1.0
    for wrong, message in (
        (config, "^unknown setting 'optim.learning_rate': the keys of this section are "),
        ({"seed": 1}, "^missing settings checkpoint, "),
        (None, "^the config is None, not a ConfigDict: fix it"),
    ):
        with pytest.raises(UsageError, match=message):
            train.run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keeps_references_between_keys(tmp_path: Path) -> None:
    config = read_file(tmp_path, "config.eval.crop = config.crops.get_ref('global_size')")
    override(config, ["--config.crops.global_size=48"])
    assert config.eval.crop == 48


@pytest.mark.parametrize(
    ("definition", "argument", "message"),
    [
        ("get_config():", ":debug", r"get_config takes no argument, but :debug was given: remove"),
        ("get_config(a, b):", "", r"get_config needs more than one argument: define get_config"),
        ("config():", "", r"it does not define a function get_config\(arg\): add one"),
    ],
)
def test_rejects_signatures(definition: str, argument: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def {definition}\n    return 1\n")
    with pytest.raises(UsageError, match=message):
        read_config(f"{tmp_path}/mine.py{argument}")


@pytest.mark.parametrize("definition", ["get_config():", "get_config(arg):", "get_config(*x):"])
def test_accepts_signatures(definition: str, tmp_path: Path) -> None:
    text = f"from configs import quickstart\ndef {definition}\n    return quickstart.get_config()"
    (tmp_path / "mine.py").write_text(text)
    assert read_config(f"{tmp_path}/mine.py").to_json() == read_config("quickstart").to_json()


def test_paths_may_contain_colons(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    read_file(folder, "config.seed = 5")
    for argument in ("", ":debug"):
        assert read_config(f"{folder}/mine.py{argument}").seed == 5


def test_configs_is_our_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package named `configs` first on the path, or already imported, is not used."""
    other = tmp_path / "configs"
    other.mkdir()
    for name in ("__init__", "default", "quickstart"):
        (other / f"{name}.py").write_text("def get_config(arg=''): return {}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    import configs.default

    theirs = dict(sys.modules)
    assert configs.__path__ == [str(other)]
    assert read_file(tmp_path, "import configs.default; config.seed = 5").seed == 5
    assert {name: sys.modules[name] for name in theirs} == theirs
    assert sys.modules["configs"] is configs
