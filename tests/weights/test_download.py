"""Downloads from servers that break off, lie or redirect."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_jax.weights.download import DownloadError, download
from tests.support.loopback import FILE, HALF, Server, serve


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def fetch(server: Server, path: Path, limit: int = 1 << 30) -> bytes:
    download(f"{server.address}/file.pth", path, limit=limit)
    return path.read_bytes()


def change(server: Server, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(server, name, value)


@pytest.mark.parametrize("chunked", [False, True])
def test_download_with_a_progress_bar(
    server: Server, tmp_path: Path, chunked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server.chunked = chunked
    assert fetch(server, tmp_path / "part") == FILE
    assert ("file.pth:" if chunked else "file.pth: 100%") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": 404}, "responds 404 Not Found$"),
        ({"status": 503}, "responds 503 Service Unavailable$"),
        ({"headers": {"Content-Length": ""}}, "has no Content-Length"),
        ({"headers": {"Content-Length": "9, 9"}}, "has no Content-Length|cannot be down"),
        ({"headers": {"Content-Length": str(2 << 30)}}, "2147483648 bytes, but at most 10737418"),
        ({"headers": {"Content-Length": "9999999"}}, f"{len(FILE)} bytes read, .* more expected"),
        ({"cut": HALF}, f"cannot be downloaded: .*{HALF} bytes read, {HALF} more expected"),
        ({"chunked": True, "cut": 0}, "cannot be downloaded"),
        ({"redirects": {"/file.pth": "http://example.com/"}}, "only redirects to https"),
        ({"redirects": {"/file.pth": "//example.com/"}}, "only redirects to https"),
        ({"redirects": {"/file.pth": "file:///etc/passwd"}}, "only redirects to https"),
        ({"redirects": {"/file.pth": "/file.pth"}}, "cannot be downloaded: .*30 redirects"),
    ],
)
def test_errors_name_address_and_reason(
    server: Server, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    change(server, changes)
    with pytest.raises(DownloadError, match=rf"^{server.address}/file.pth .*{message}"):
        fetch(server, tmp_path / "part")
    assert set(server.paths) == {"/file.pth"}


@pytest.mark.parametrize("chunked", [False, True])
def test_follows_safe_redirects_without_reading_their_bodies(
    server: Server, tmp_path: Path, chunked: bool
) -> None:
    server.chunked = chunked
    server.redirects = {"/file.pth": "/there"}
    assert fetch(server, tmp_path / "part") == FILE
    assert server.paths == ["/file.pth", "/there"]


def test_rejects_an_endless_file_at_the_limit(server: Server, tmp_path: Path) -> None:
    server.chunked = True
    with pytest.raises(DownloadError, match="sends more than the limit of 100000 bytes"):
        fetch(server, tmp_path / "part", limit=100_000)
    assert (tmp_path / "part").stat().st_size <= 100_000
