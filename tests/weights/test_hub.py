"""The hub with a local server, with a folder, and offline."""

import hashlib
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dino_jax.errors import UsageError
from dino_jax.weights import hub
from tests.support.loopback import FILE, HALF, OTHER, Server, serve

PATH = "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mirror on the loopback interface, set as DINO_JAX_HUB."""
    with serve() as server:
        monkeypatch.setenv("DINO_JAX_HUB", f"{server.address}/")
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of this test; the published address is unreachable."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/cache"))
    monkeypatch.delenv("DINO_JAX_HUB", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    return tmp_path / "home/cache/dino_jax"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def recorded(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def test_download_is_cached_in_a_private_folder(
    server: Server, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub.fetch("dino_vits16")
    assert path == cache / PATH
    assert path.read_bytes() == FILE
    assert server.paths == [f"/{PATH}"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert f"{hashlib.sha256(FILE).hexdigest()}  {path.name}\n" == recorded(path).read_text()
    assert files(path.parent) == {path.name, f"{path.name}.sha256", f"{path.name}.lock"}
    assert f"{path.name}: 100%" in capsys.readouterr().err
    server.status = 500
    assert hub.fetch("dino_vits16") == path
    assert len(server.paths) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut": HALF}, f"{HALF} bytes read, {HALF} more expected"),
        ({"content": b"<!DOCTYPE html> log in"}, "not a checkpoint: it starts with b'<!DOCT"),
    ],
)
def test_failed_download_leaves_no_file(
    server: Server, cache: Path, changes: dict[str, Any], message: str
) -> None:
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(UsageError, match=message):
        hub.fetch("dino_vits16")
    assert files((cache / PATH).parent) == {f"{Path(PATH).name}.lock"}
    server.cut, server.content = None, FILE
    assert hub.fetch("dino_vits16").read_bytes() == FILE


def test_error_for_a_missing_file_names_the_mirror(server: Server, cache: Path) -> None:
    server.status = 404
    with pytest.raises(UsageError, match=rf"{server.address}/{PATH} responds 404 Not Found\. Do"):
        hub.fetch("dino_vits16")
    with pytest.raises(UsageError, match=f"DINO_JAX_HUB .now {server.address}. to a .*{PATH}"):
        hub.fetch("dino_vits16")
    assert not recorded(cache / PATH).exists()


@pytest.mark.parametrize(
    ("what", "path", "limit"),
    [
        ("full", PATH.replace(".pth", "_full_checkpoint.pth"), 4 << 30),
        ("linear", PATH.replace("16_pretrain.pth", "16_linearweights.pth"), 64 << 20),
    ],
)
def test_each_kind_of_file_has_a_size_limit(
    server: Server, cache: Path, what: hub.Kind, path: str, limit: int
) -> None:
    assert hub.fetch("dino_vits16", what) == cache / path
    (cache / path).unlink()
    server.headers = {"Content-Length": str(limit + 1)}
    with pytest.raises(UsageError, match=f"{limit + 1} bytes, but at most {limit} are allowed"):
        hub.fetch("dino_vits16", what)


@pytest.mark.parametrize("changed", [OTHER, FILE[:-1], b""])
def test_rejects_a_changed_file_until_it_is_downloaded_again(
    server: Server, changed: bytes
) -> None:
    path = hub.fetch("dino_vits16")
    path.write_bytes(changed)
    with pytest.raises(UsageError, match=f"{path} has changed .*delete the file to down"):
        hub.fetch("dino_vits16")
    path.unlink()
    assert hub.fetch("dino_vits16").read_bytes() == FILE


def test_offline_error_explains_how_to_add_the_file(cache: Path) -> None:
    address = f"https://dl.fbaipublicfiles.com/dino/{PATH}"
    with pytest.raises(UsageError, match="Connection refused") as caught:
        hub.fetch("dino_vits16")
    message = str(caught.value)
    assert message.startswith(f"{address} cannot be downloaded: ")
    assert f"Download {address} to {cache / PATH} yourself, or set DINO_JAX_HUB (not" in message

    (cache / PATH).write_bytes(FILE)
    assert hub.fetch("dino_vits16") == cache / PATH
    (cache / PATH).write_bytes(OTHER)
    with pytest.raises(UsageError, match="has changed"):
        hub.fetch("dino_vits16")


def test_rejects_a_web_page_in_the_cache(cache: Path) -> None:
    (cache / PATH).parent.mkdir(parents=True)
    (cache / PATH).write_bytes(b"<html>")
    with pytest.raises(UsageError, match="not a checkpoint: it starts with b'<html>'; replace"):
        hub.fetch("dino_vits16")
    assert not recorded(cache / PATH).exists()


@pytest.mark.parametrize("spelling", ["{}", "file://{}"])
def test_mirror_folder_is_used_in_place(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.setenv("DINO_JAX_HUB", spelling.format(tmp_path / "mirror"))
    file = tmp_path / "mirror" / PATH
    file.parent.mkdir(parents=True)
    with pytest.raises(UsageError, match=f"lacks {file}: put https://dl.fb.*{PATH} there"):
        hub.fetch("dino_vits16")
    file.write_bytes(b"<html>")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        hub.fetch("dino_vits16")
    file.write_bytes(FILE)
    assert hub.fetch("dino_vits16") == file
    recorded(file).write_text(f"{hashlib.sha256(OTHER).hexdigest()}  {file.name}\n")
    for content in (recorded(file).read_bytes(), b"\xff\xfe no text"):
        recorded(file).write_bytes(content)
        with pytest.raises(UsageError, match="has changed"):
            hub.fetch("dino_vits16")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("http://example.com/dino", "'http://example.com/dino' must be an https address"),
        ("http://127.0.0.1.example.com/", "must be an https address"),
        ("ftp://127.0.0.1/", "must be an https address"),
        ("file://host/dino", "must be an https address"),
        ("https://", "must be an https address"),
        ("https://example.com/?key=1", "must be an https address"),
        ("https://example.com:port/", "must be an https address"),
        ("https://me:hunter2@example.com/", r"(?s)^(?!.*hunter2).*password for example\.com"),
        ("/no/such/folder", "'/no/such/folder' is not a folder: set it"),
        ("~nobodyx/h", "=~nobodyx/h: the home folder of ~nobodyx is unknown"),
    ],
)
def test_rejects_unsafe_mirrors(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv("DINO_JAX_HUB", value)
    with pytest.raises(UsageError, match=message):
        hub.fetch("dino_vits16")


def test_error_for_an_unwritable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"Not a directory.*set DINO_JAX_CACHE to another"):
        hub.fetch("dino_vits16")
    assert not server.paths


def test_threads_share_one_download(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.delay = 0.2
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(hub.fetch, ["dino_vits16"] * 4))
    assert len(paths) == len(server.paths) == 1
    assert paths.pop().read_bytes() == FILE
    assert f"is locked by process {os.getpid()} on" in caplog.text


def test_killed_process_leaves_no_lock_and_no_broken_file(server: Server, cache: Path) -> None:
    server.stall = HALF
    program = "from dino_jax.weights import hub; hub.fetch('dino_vits16')"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not [part for part in cache.rglob("*.part.pth") if part.stat().st_size]:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cache / PATH).exists()
    server.stall = None
    path = hub.fetch("dino_vits16")
    assert path.read_bytes() == FILE
    assert files(path.parent) == {path.name, f"{path.name}.sha256", f"{path.name}.lock"}


def test_pooch_is_imported_only_to_download() -> None:
    program = "import sys, dino_jax.weights.hub; assert not {'pooch', 'requests'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_rejects_unknown_names_and_kinds(server: Server) -> None:
    with pytest.raises(UsageError, match=r"'dino_vits61': did you mean 'dino_vits16'\? cho"):
        hub.fetch("dino_vits61")
    with pytest.raises(UsageError, match="'zzz': choose one of dino_vits16, dino_vits8"):
        hub.fetch("zzz")
    with pytest.raises(UsageError, match="dino_vits8_300ep has no file 'linear': choose one of b"):
        hub.fetch("dino_vits8_300ep", "linear")
    assert not server.paths


def test_addresses() -> None:
    model = hub.RELEASED["dino_vitb8"]
    base = "https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain"
    assert model.url("backbone") == f"{base}/dino_vitbase8_pretrain.pth"
    assert model.url("full") == f"{base}/dino_vitbase8_pretrain_full_checkpoint.pth"
    assert model.url("linear") == f"{base}/dino_vitbase8_linearweights.pth"
