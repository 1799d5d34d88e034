"""The application on a socket of this machine, by uvicorn."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vizattn.errors import VizattnError

__all__ = ["bind", "is_loopback", "make_server"]

#: Seconds for the head of a request, and for a whole exchange on a connection.
HEAD_SECONDS, EXCHANGE_SECONDS = 10.0, 150.0
#: Open connections, at most.
CONNECTIONS = 128


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` and `port`; 0: any that is free.

    Raises:
        VizattnError: It cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VizattnError(
            f"Cannot listen at {host}, port {port}: {reason}. Choose another --port or --host."
        ) from error


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a numeric address."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def make_server(app: Any) -> uvicorn.Server:
    """A server, to be run with ``run(sockets=[...])``: until Ctrl-C, which it raises again, or a signal to end.

    What runs then has five seconds to finish.
    """
    logging.getLogger("uvicorn.error").addFilter(_expected)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it speaks of forms that are none
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=16 << 10,
    )
    return uvicorn.Server(config)


def _expected(record: logging.LogRecord) -> bool:
    """Not what any client can cause."""
    return not record.getMessage().startswith(("Invalid HTTP request", "Exceeded concurrency", "Unsupported upgrade"))


class PatientProtocol(H11Protocol):
    """HTTP whose connections end when a request does not get on: no head in time, or an answer that is not taken."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch(None, 0.0)

    def _watch(self, seen: tuple[Any, bool] | None, since: float) -> None:
        if self not in self.connections:  # it is lost; one that is closed may still have something to send
            return
        now = self.loop.time()
        running = self.cycle is not None and not self.cycle.response_complete
        state = (self.cycle, running)
        if seen != state:
            since = now
        if now - since >= (EXCHANGE_SECONDS if running else HEAD_SECONDS):
            self.transport.abort()
            return
        again: Callable[..., None] = self._watch
        self.loop.call_later(HEAD_SECONDS / 2, again, state, since)
