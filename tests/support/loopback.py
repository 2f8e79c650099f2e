"""A file server on the loopback interface that can misbehave, for tests of downloads."""

import contextlib
import dataclasses
import http.server
import threading
import time
from collections.abc import Iterator

FILE = b"PK\x03\x04" + bytes(range(256)) * 2000  # half a megabyte, read in several chunks
OTHER = b"PK\x03\x04" + bytes(reversed(range(256))) * 2000  # has the same length
HALF = len(FILE) // 2


@dataclasses.dataclass
class Server:
    """How a server behaves, and the paths requested from it."""

    address: str = ""  # without a trailing slash
    content: bytes = FILE  # at every path
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    status: int = 200
    # path: address; the body of such a response is never sent
    redirects: dict[str, str] = dataclasses.field(default_factory=dict)
    chunked: bool = False
    cut: int | None = None  # bytes of the body after which it disconnects
    stall: int | None = None  # bytes of the body after which it stalls
    stalled: threading.Event = dataclasses.field(
        default_factory=threading.Event
    )  # set it to continue
    delay: float = 0.0  # seconds before a response
    paths: list[str] = dataclasses.field(default_factory=list)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.paths.append(request.path)
        time.sleep(self.delay)
        status, headers = self.status, dict(self.headers)
        if request.path in self.redirects:
            status, headers["Location"] = 302, self.redirects[request.path]
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers.setdefault("Content-Length", str(len(self.content)))
        request.send_response(status)
        for name, value in headers.items():
            if value:
                request.send_header(name, value)
        request.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may disconnect
            self._send(self.content, request)

    def _send(self, body: bytes, request: http.server.BaseHTTPRequestHandler) -> None:
        if request.path in self.redirects:
            self.stalled.wait(timeout=60)
        elif self.chunked:
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
    """Runs a server in its own thread within this context."""
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
            about.stalled.set()
            listening.shutdown()
            thread.join()
