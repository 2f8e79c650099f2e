"""One file over HTTPS: bounded in size, resumed after an interruption, never taken for another.

What has come lies in a `.part` file. Beside it `.part.json` notes what the bytes are of: the
address, the length, and the server's mark for this version of the file (a strong ETag, else
Last-Modified). A later call asks for the rest only, and takes it only if those still hold.
"""

import http.client
import itertools
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import dino_jax

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TIMEOUT = 30.0  # seconds without an answer, or without a byte of it
_CHUNK = 1 << 16  # bytes: the most that a kill can lose
_PAGES = ("text/html", "application/xhtml+xml")  # what login and error pages come as


class DownloadError(Exception):
    """The file cannot be had now; the message names the address and says why."""


def is_safe(url: str) -> bool:
    """Whether nobody on the way can read or change what `url` gives."""
    scheme = urllib.parse.urlsplit(url).scheme
    return scheme == "https" or (scheme == "http" and is_loopback(url))


def is_loopback(url: str) -> bool:
    """Whether `url` stays on this machine."""
    return urllib.parse.urlsplit(url).hostname in _LOOPBACK


def download(url: str, part: Path, *, limit: int, magic: tuple[bytes, ...]) -> None:
    """Fetches `url` into `part`, continuing what an interrupted call left there.

    Args:
      url: an address for which `is_safe` holds; redirects must keep to that.
      part: file that is whole when this returns, and is kept for the next call when it raises.
        One caller at a time.
      limit: the most bytes that the file may have.
      magic: what the file may begin with; a page of a login portal does not.
    Raises:
      DownloadError: no answer, no such file, a page instead of a file, too many or too few bytes.
      OSError: `part` cannot be written.
    """
    note = Path(f"{part}.json")
    left = _read_note(part, note, url)
    if left["have"] and left["have"] == left["total"]:
        return  # killed after the last byte
    response, have = _open_rest(url, left)
    with response:
        _refuse(response, url, have, limit)
        total = None if response.length is None else have + response.length
        chunks = _chunks(response, url)
        if not have:
            first = next(chunks, b"")
            if not first.startswith(magic):
                raise DownloadError(f"{url} gives no checkpoint: it begins with {first[:16]!r}")
            chunks = itertools.chain([first], chunks)
            part.unlink(missing_ok=True)  # before the note: it never vouches for other bytes
            about = {"url": url, "total": total, "version": _version(response)}
            note.write_text(json.dumps(about))
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with bar, part.open("ab") as file:
            for chunk in chunks:
                have += len(chunk)
                if have > limit:
                    forget(part)
                    raise DownloadError(f"{url} gives more than the {limit} bytes allowed")
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have != total:
        raise DownloadError(
            f"{url} ended after {have} of {total} bytes; they are kept, and the next call goes on"
        )


def forget(part: Path) -> None:
    """Removes what `download` keeps to go on with `part`."""
    part.unlink(missing_ok=True)
    Path(f"{part}.json").unlink(missing_ok=True)


def _read_note(part: Path, note: Path, url: str) -> dict[str, Any]:
    """How many bytes there are to go on from, and what of; none if that is not known."""
    nothing = {"have": 0, "total": None, "version": None}
    if not part.exists() or not note.exists():
        return nothing
    try:
        about = json.loads(note.read_text())
    except ValueError:  # the machine went down while it was written
        return nothing
    return about | {"have": part.stat().st_size} if about["url"] == url else nothing


def _open_rest(url: str, left: dict[str, Any]) -> tuple[http.client.HTTPResponse, int]:
    """A response that follows on the first `have` bytes, and `have`: 0 for the whole file."""
    have = left["have"]
    if have and left["total"]:
        headers = {"Range": f"bytes={have}-"}
        if left["version"]:
            headers["If-Range"] = left["version"]
        response = _open(url, headers)
        if response.status == http.HTTPStatus.OK:  # another version, or no ranges here
            return response, 0
        if (
            response.status == http.HTTPStatus.PARTIAL_CONTENT
            and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            and response.length == left["total"] - have
            and _version(response) in (None, left["version"])
        ):
            return response, have
        response.close()
    return _open(url, {}), 0


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """The answer to a request; to one without a range where the server has not got the range."""
    handlers: list[urllib.request.BaseHandler] = [_SafeRedirects()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy's loopback is not ours
    opener = urllib.request.build_opener(*handlers)
    agent = {"User-Agent": f"dino_jax/{dino_jax.__version__}"}
    request = urllib.request.Request(url, headers=agent | headers)
    try:
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and "Range" in headers:
            return _open(url, {})
        raise DownloadError(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"{url} cannot be reached: {reason}") from error


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and between loopback addresses."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: http.client.HTTPResponse,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()  # unread: nothing bounds its body
        if not is_safe(newurl) or (is_loopback(newurl) and not is_loopback(req.full_url)):
            raise DownloadError(
                f"{req.full_url} redirects to {newurl}: only https is followed; perhaps the "
                "network wants a login first"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refuse(response: http.client.HTTPResponse, url: str, have: int, limit: int) -> None:
    """Raises for an answer that cannot be the file, before any byte is read."""
    kind = response.headers.get_content_type()
    if kind in _PAGES:
        raise DownloadError(
            f"{url} gives a page ({kind}), not a file; perhaps the network wants a login first"
        )
    if response.length is None and not response.chunked:
        raise DownloadError(f"{url} does not say how long the file is: a cut would go unnoticed")
    if response.length is not None and have + response.length > limit:
        raise DownloadError(
            f"{url} has {have + response.length} bytes, more than the {limit} allowed"
        )


def _chunks(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """The bytes as they come."""
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"{url} broke off ({error}); what came is kept, and the next call goes on"
        ) from error


def _version(response: http.client.HTTPResponse) -> str | None:
    """The server's mark for this version of the file, as If-Range takes it."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")
