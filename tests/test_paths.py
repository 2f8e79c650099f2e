"""Paths from users: `~`, unknown users, and addresses, in every command and library function."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import dino_jax
from dino_jax import cli, train
from dino_jax.cache import cache_folder
from dino_jax.config.file import read_config
from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.paths import local_path, local_paths
from dino_jax.weights import hub
from dino_jax.weights.formats.pth.file import read_torch_file
from tests.support import runs
from tests.support.class_folders import class_folders

ADDRESSES = (
    "gs://bucket/x",
    "s3://b/x@a",
    "http://h/x.pth",
    "hf://o/n",
    "file://x/y",
    "az+b://c/x",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("address", ADDRESSES)
def test_rejects_addresses(address: str) -> None:
    message = f"output={re.escape(address)} is an address, .*: mount or copy it, and give its local"
    for path in (address, Path(address)):
        with pytest.raises(UsageError, match=message):
            local_path(path, "output")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody_here/x", "the home folder of ~nobody_here is unknown; .*or ./~nobody_here/x for"),
        ("", "output='' is not a path: give the path of a file or a folder"),
        ("a\0b", "is not a path"),
    ],
)
def test_rejects_what_is_no_path(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        local_path(path, "output")


def test_expands_the_home_folder_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "elsewhere")
    assert local_path("~", "output") == home
    assert local_path(Path("~/a b"), "output") == home / "a b"
    for name in ("$RUNS/x", "${RUNS}", "a~b", "./~x", "a:b/c", "./gs:/x", "x@y", "C:/x", "."):
        assert local_path(name, "output") == Path(name)


def test_decorates_functions(home: Path) -> None:
    @local_paths
    def job(data: str, out: Path, more: Path | None = None, *, last: Path = Path("~/d")) -> tuple:
        return data, out, more, last

    assert job("~/a", "~/b", last="~/c") == ("~/a", home / "b", None, home / "c")
    with pytest.raises(UsageError, match="more=gs://b is an address"):
        job("a", "b", more=Path("gs://b"))


@pytest.mark.parametrize("path", ["gs://bucket/x", "~nobody_here/x"])
@pytest.mark.parametrize(
    "use",
    [
        lambda path: dino_jax.load(path),
        lambda path: dino_jax.load_linear(path),
        lambda path: read_torch_file(path),
        lambda path: open_source(path),
        lambda path: open_source(f"folder:{path}@train"),
        lambda path: open_source(f"records:{path}[:3]"),
        lambda path: open_source(f"idx:{path}@test"),
        lambda path: read_config(f"{path}.py:debug"),
        lambda path: train.run(runs.tiny_config(), path),
        lambda path: FeatureCache(save_features=Path(path)),
        lambda path: FeatureCache(load_features=path),
    ],
)
def test_library_functions_reject(
    path: str, use: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"is an address|the home folder of"):
        use(path)
    assert not list(tmp_path.iterdir())


def command_lines() -> dict[str, str]:
    """The smallest command line of every job that takes a path, which the test writes as PATH."""
    some = "--weights=w --data=d --output=PATH"
    pair = "--weights=w --train=d --test=d"
    return {
        "knn": f"{pair} --output=PATH",
        "knn report": f"{pair} --report=PATH",
        "knn features": f"{pair} --save-features=PATH",
        "linear": f"{pair} --workdir=PATH",
        "logistic": f"{pair} --output=PATH",
        "embed": some,
        "attention": "--weights=w --image=d --output=PATH",
        "attention-score": some,
        "attention-video": "--weights=w --video=PATH --output=x.mp4",
        "pca": "--weights=w --image=d --output=PATH",
        "retrieval": "--weights=w --data=PATH",
        "copy-detection": "--weights=w --data=PATH",
        "video-segmentation": some,
        "pack": "s PATH",
        "pack source": "PATH out",
        "convert": "w PATH",
        "convert file": "PATH out",
        "inspect": "PATH",
    }


@pytest.mark.parametrize(("name", "words"), command_lines().items())
def test_commands_reject(
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main([name.split()[0], *words.replace("PATH", "s3://bucket/x").split()])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "s3://bucket/x is an address, but only local files and folders are supported" in error
    assert not list(tmp_path.iterdir())


def test_sources_below_the_home_folder(home: Path) -> None:
    class_folders(home / "set", "ab", images=2)
    class_folders(home / "with@sign", "c", images=1)
    assert len(open_source("folder:~/set@a")) == len(open_source("~/set@a")) == 2
    assert len(open_source("~/with@sign")) == len(open_source("folder:~/with@sign")) == 1
    assert len(open_source("~/set[:3]")) == 3


def test_environment_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_JAX_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    for name, use in (("CACHE", cache_folder), ("HUB", lambda: hub.fetch("dino_vits16"))):
        monkeypatch.setenv(f"DINO_JAX_{name}", "~nobody_here/x")
        with pytest.raises(UsageError, match=f"DINO_JAX_{name}=~nobody_here/x: the home folder"):
            use()
