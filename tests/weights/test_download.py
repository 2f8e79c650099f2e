"""Downloads from servers that cut, change, lie and redirect."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_jax.weights.download import DownloadError, download, forget
from tests.support.loopback import FILE, HALF, OTHER, Server, serve


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "file.pth.part"


def fetch(server: Server, part: Path, path: str = "file.pth", limit: int = 1 << 30) -> bytes:
    download(f"{server.address}/{path}", part, limit=limit, magic=(b"PK", b"\x80"))
    return part.read_bytes()


def interrupt(server: Server, part: Path) -> None:
    """A download that ends after the first half."""
    server.cut = HALF
    with pytest.raises(DownloadError, match=f"ended after {HALF} of {len(FILE)} bytes; they are"):
        fetch(server, part)
    server.cut = None
    assert part.read_bytes() == FILE[:HALF]


def change(server: Server, changes: dict) -> None:
    for name, value in changes.items():
        setattr(server, name, value)


WEAK = {"ETag": 'W/"weak"', "Last-Modified": "Wed, 01 May 2024 00:00:00 GMT"}


@pytest.mark.parametrize(
    ("headers", "condition"),
    [({"ETag": '"one"'}, '"one"'), (WEAK, WEAK["Last-Modified"]), ({}, None)],
)
def test_a_download_goes_on_where_it_stopped(
    server: Server, part: Path, headers: dict[str, str], condition: str | None
) -> None:
    server.headers = headers
    interrupt(server, part)
    assert fetch(server, part) == FILE
    assert server.asked[1]["range"] == f"bytes={HALF}-"
    assert server.asked[1].get("if-range") == condition


@pytest.mark.parametrize(
    ("changes", "requests"),
    [
        ({"ranges": False}, 2),
        ({"content": OTHER, "headers": {"ETag": '"two"'}}, 2),
        ({"content": OTHER, "headers": {"ETag": '"two"'}, "if_range": False}, 3),
        ({"content": OTHER[:HALF]}, 3),  # 416
        ({"content": OTHER[:-5], "headers": {}, "if_range": False}, 3),  # another length
    ],
)
def test_a_download_starts_again_where_it_cannot_go_on(
    server: Server, part: Path, changes: dict, requests: int
) -> None:
    interrupt(server, part)
    change(server, changes)
    assert fetch(server, part) == server.content
    assert server.asked[1]["range"] == f"bytes={HALF}-"
    assert len(server.asked) == requests


def test_a_part_of_another_address_is_not_gone_on_with(server: Server, part: Path) -> None:
    interrupt(server, part)
    server.content = OTHER
    assert fetch(server, part, "elsewhere.pth") == OTHER
    assert "range" not in server.asked[1]


def test_a_part_that_is_whole_is_not_asked_for(server: Server, part: Path) -> None:
    interrupt(server, part)
    part.write_bytes(FILE)
    assert fetch(server, part) == FILE
    assert len(server.asked) == 1


@pytest.mark.parametrize("note", ["", '{"url"', None])
def test_a_part_of_unknown_origin_is_not_gone_on_with(
    server: Server, part: Path, note: str | None
) -> None:
    interrupt(server, part)
    note_file = part.with_name(f"{part.name}.json")
    note_file.unlink() if note is None else note_file.write_text(note)
    assert fetch(server, part) == FILE
    assert "range" not in server.asked[1]


def test_a_file_that_comes_in_chunks(server: Server, part: Path) -> None:
    server.chunked = True
    assert fetch(server, part) == FILE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": 404}, "answers 404 Not Found"),
        ({"status": 503}, "answers 503 Service Unavailable"),
        ({"headers": {"Content-Type": "text/html"}}, "gives a page .text/html., not a file"),
        ({"content": b"<!DOCTYPE html> please log in"}, "it begins with b'<!DOCTYPE html> '"),
        ({"content": b""}, "it begins with b''"),
        ({"headers": {"Content-Length": ""}}, "does not say how long the file is"),
        ({"headers": {"Content-Length": str(2 << 30)}}, "2147483648 bytes, more than the 1073741"),
        ({"redirects": {"/file.pth": "http://example.com/"}}, "only https is followed"),
        ({"redirects": {"/file.pth": "file:///etc/passwd"}}, "answers 302"),
    ],
)
def test_what_is_not_the_file_is_not_kept(
    server: Server, part: Path, changes: dict, message: str
) -> None:
    change(server, changes)
    with pytest.raises(DownloadError, match=f"^{server.address}/file.pth .*{message}"):
        fetch(server, part)
    assert not part.exists()
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headers": {"Content-Length": "9999999"}}, f"ended after {len(FILE)} of 9999999 bytes"),
        ({"chunked": True, "cut": 0}, "broke off .IncompleteRead"),
    ],
)
def test_too_few_bytes_are_an_error(
    server: Server, part: Path, changes: dict, message: str
) -> None:
    change(server, changes)
    with pytest.raises(DownloadError, match=message):
        fetch(server, part)


def test_a_login_page_does_not_cost_the_bytes_that_came_before(server: Server, part: Path) -> None:
    interrupt(server, part)
    change(server, {"ranges": False, "headers": {"Content-Type": "text/html"}})
    with pytest.raises(DownloadError, match="wants a login"):
        fetch(server, part)
    change(server, {"ranges": True, "headers": {"ETag": '"one"'}})
    assert fetch(server, part) == FILE
    assert server.asked[2]["range"] == f"bytes={HALF}-"


def test_no_more_is_read_than_allowed(server: Server, part: Path) -> None:
    server.chunked = True
    with pytest.raises(DownloadError, match="gives more than the 100000 bytes allowed"):
        fetch(server, part, limit=100_000)
    assert not part.exists()


def test_redirects_between_loopback_addresses_are_followed(server: Server, part: Path) -> None:
    interrupt(server, part)
    server.redirects = {"/file.pth": f"{server.address}/there"}
    assert fetch(server, part) == FILE
    assert server.paths[1:] == ["/file.pth", "/there"]
    assert server.asked[2]["range"] == f"bytes={HALF}-"


def test_forget(server: Server, part: Path) -> None:
    interrupt(server, part)
    forget(part)
    assert not list(part.parent.iterdir())
