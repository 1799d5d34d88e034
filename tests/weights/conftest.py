"""A misbehaving server, a cache of its own for each test, and no network."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from server import Server, serving

from vizattn.weights.download import Patience


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's cache, proxies or network; no waiting between attempts."""
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path / "home"))
    for name in ("VIZATTN_LOCK", "VIZATTN_MIRROR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(sys.modules["vizattn.weights.download"], "PATIENCE", Patience(attempts=3, pause=0.0))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> Any:
        assert address[0] == "127.0.0.1", f"tried to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
