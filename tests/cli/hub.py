"""A Hugging Face hub on this machine, as much of it as an upload asks for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What it was sent, and how it answers."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        """Of the answer to every request; other than 200 it is an error."""
        self.tokens: set[str | None] = set()
        self.repositories: list[str] = []
        self.files: dict[str, bytes] = {}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that takes every file into its commit, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.tokens.add(self.headers["Authorization"])
            if hub.status != 200:
                self.answer({"error": "no"}, hub.status)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.repositories.append(name)
                self.answer({"url": f"{hub.url}/{name}", "name": name, "id": "1"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{hub.url}/{hub.repositories[-1]}/commit/1", "commitOid": "1"})
            else:
                self.answer({"error": f"unexpected {self.path}"}, 500)

        def do_GET(self) -> None:
            self.answer({"error": f"unexpected {self.path}"}, 500)

        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
