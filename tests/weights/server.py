"""A web server on this machine that misbehaves as told."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What one request gets, instead of the file."""

    status: int = 200
    body: bytes | None = None
    """Instead of the file's bytes."""
    cut: int | None = None
    """Close the connection after so many bytes of the body."""
    stall: float = 0.0
    """Seconds of silence after that, before closing."""
    ignore_range: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with ranges; `script` has answers for the next requests, first come first served."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.script: list[Answer] = []
        self.always: Answer | None = None
        self.etag: str | None = '"v1"'
        self.modified: str | None = None
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.on_request: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self) -> list[str | None]:
        """The Range of each request so far."""
        return [headers.get("Range") for _, headers in self.requests]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.server, self.path.partition("?")[0].lstrip("/")
        server.requests.append((self.path, dict(self.headers)))
        server.on_request()
        answer = server.script.pop(0) if server.script else server.always or Answer()
        data = server.files.get(path) if answer.body is None else answer.body
        status = answer.status if data is not None or answer.status != 200 else 404
        data = data or b""
        headers = {}
        if server.etag:
            headers["ETag"] = server.etag
        if server.modified:
            headers["Last-Modified"] = server.modified
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, server.etag, server.modified)
        if status == 200 and wanted and same and not answer.ignore_range:
            start, total = int(wanted[1]), len(data)
            if start >= total:
                status, data, headers["Content-Range"] = 416, b"", f"bytes */{total}"
            else:
                status, data, headers["Content-Range"] = 206, data[start:], f"bytes {start}-{total - 1}/{total}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), **answer.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if answer.cut is None else data[: answer.cut])
            self.wfile.flush()
            time.sleep(answer.stall)
        self.close_connection = True


@contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
