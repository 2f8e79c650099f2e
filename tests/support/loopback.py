"""A file server on the loopback interface that misbehaves as told, for tests of downloads."""

import contextlib
import dataclasses
import http.server
import threading
import time
from collections.abc import Iterator

FILE = b"PK\x03\x04" + bytes(range(256)) * 2000  # half a megabyte: several reads
OTHER = b"PK\x03\x04" + bytes(reversed(range(256))) * 2000  # as long
HALF = len(FILE) // 2


@dataclasses.dataclass
class Server:
    """What a server does next, and what it was asked."""

    address: str = ""  # without a slash at the end
    content: bytes = FILE  # under every path
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: {"ETag": '"one"'})
    status: int | None = None  # answered to everything
    redirects: dict[str, str] = dataclasses.field(default_factory=dict)  # path: address
    ranges: bool = True
    if_range: bool = True  # heeds If-Range
    chunked: bool = False
    cut: int | None = None  # bytes of the body after which it hangs up
    stall: int | None = None  # bytes of the body after which it waits
    stalled: threading.Event = dataclasses.field(default_factory=threading.Event)  # ends the wait
    delay: float = 0.0  # seconds before an answer
    asked: list[dict[str, str]] = dataclasses.field(default_factory=list)  # headers, in lower case
    paths: list[str] = dataclasses.field(default_factory=list)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(asked)
        self.paths.append(request.path)
        time.sleep(self.delay)
        body, status, headers = self.content, self.status or 200, dict(self.headers)
        start = int(asked.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if self.if_range and asked.get("if-range") not in (None, *headers.values()):
            start = 0
        if start and self.ranges:
            status = 206 if start < len(body) else 416
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        if request.path in self.redirects:
            status, headers["Location"] = 302, self.redirects[request.path]
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers.setdefault("Content-Length", str(len(body)))
        request.send_response(status)
        for name, value in headers.items():
            if value:
                request.send_header(name, value)
        request.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may hang up too
            self._send(body, request)

    def _send(self, body: bytes, request: http.server.BaseHTTPRequestHandler) -> None:
        if self.chunked:
            for at in range(0, len(body), 1000):
                piece = body[at : at + 1000]
                request.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            request.wfile.write(b"0\r\n\r\n" if self.cut is None else b"")
        elif self.stall is None:
            request.wfile.write(body[: self.cut])
        else:
            request.wfile.write(body[: self.stall])
            self.stalled.wait(timeout=60)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server in a thread of its own, ended with the block."""
    about = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            about.answer(self)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        about.address = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield about
        finally:
            listening.shutdown()
            thread.join()
