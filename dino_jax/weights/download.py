"""Downloads a file over HTTPS with pooch, with a size limit and a progress bar."""

import contextlib
import io
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    import requests

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CHUNK = 1 << 16  # bytes


class DownloadError(Exception):
    """A download that failed; the message names the address and the reason."""


def is_safe(url: str) -> bool:
    """Whether the response to `url` cannot be read or changed on its way to this machine."""
    scheme = urllib.parse.urlsplit(url).scheme
    return scheme == "https" or (scheme == "http" and is_loopback(url))


def is_loopback(url: str) -> bool:
    """Whether `url` points to this machine."""
    return urllib.parse.urlsplit(url).hostname in _LOOPBACK


def download(url: str, path: Path, *, limit: int) -> None:
    """Downloads `url` to `path`. If this raises, `path` may contain part of the file.

    Args:
      url: an address for which `is_safe` is true. Redirects must be safe too.
      path: the file to write.
      limit: the maximum size of the file in bytes.
    Raises:
      DownloadError: no response, an error status, an unsafe redirect, too many or too few bytes.
      OSError: `path` cannot be written.
    """
    import pooch  # here, because it is slow to import
    import requests

    with contextlib.ExitStack() as stack:

        def check(response: requests.Response, *_: object, **__: object) -> None:
            stack.callback(response.close)
            _check_response(response, url, limit)

        # pooch sets the total once it is known. Until then, tqdm needs one to be truthy.
        bar = tqdm(total=limit, desc=url.rpartition("/")[2], unit="B", unit_scale=True)
        downloader = pooch.HTTPDownloader(
            progressbar=stack.enter_context(bar),
            chunk_size=_CHUNK,
            hooks={"response": check},  # called for redirects too
            headers={"Accept-Encoding": "identity"},  # so that the size is the file's
            # For a proxy, the loopback address would be the proxy's own.
            proxies={"no_proxy": ",".join(_LOOPBACK)} if is_loopback(url) else None,
        )
        file = stack.enter_context(_BoundedFile(path, limit, url))
        try:
            downloader(url, file, None)
        except (requests.RequestException, ValueError) as error:  # ValueError: a broken header
            raise DownloadError(f"{url} cannot be downloaded: {_root_cause(error)}") from error


class _BoundedFile(io.BufferedWriter):
    """A file with a maximum size."""

    def __init__(self, path: Path, limit: int, url: str) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._limit = limit
        self._url = url

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self._limit:
            raise DownloadError(f"{self._url} sends more than the limit of {self._limit} bytes")
        return super().write(data)


def _check_response(response: "requests.Response", url: str, limit: int) -> None:
    """Rejects a response that cannot be the file, before its body is read."""
    length = response.raw.length_remaining  # None if the server does not send it
    if response.is_redirect:
        response.close()  # requests would read the body, which may be endless
        target = urllib.parse.urljoin(response.url, response.headers["location"])
        if not is_safe(target) or (is_loopback(target) and not is_loopback(url)):
            raise DownloadError(
                f"{url} redirects to {target}, but only redirects to https addresses are followed; "
                "the network may require a login first"
            )
    elif response.status_code != 200:
        raise DownloadError(f"{url} responds {response.status_code} {response.reason}")
    elif length is None and response.headers.get("Transfer-Encoding") != "chunked":
        raise DownloadError(
            f"{url} has no Content-Length, so an incomplete download would go unnoticed"
        )
    elif length is not None and length > limit:
        raise DownloadError(f"{url} has {length} bytes, but at most {limit} are allowed")


def _root_cause(error: BaseException) -> BaseException:
    """The first exception in a chain; requests wraps a refused connection four times."""
    while error.__context__:
        error = error.__context__
    return error
