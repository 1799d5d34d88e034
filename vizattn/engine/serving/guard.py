"""What every request goes through before the application: who asks, how much, for how long; and headers of answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vizattn.engine.serving.limits import Limits

__all__ = ["Guard", "error_response"]

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def error_response(status: int, message: str) -> JSONResponse:
    """An error as JSON. Connections end where the rest of an upload may still be on its way."""
    headers = {"Connection": "close"} if status in (400, 403, 408, 413) else {}
    headers |= {"Retry-After": "2"} if status == 503 else {}
    return JSONResponse({"error": message}, status, headers)


class Guard:
    """ASGI middleware.

    Args:
        app: What is guarded.
        limits: Of requests.
        hosts: Names by which the server may be asked, lower case; None: any. Others are pages elsewhere whose name was
            made to lead here (DNS rebinding).
        policy: The content security policy.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Collection[str] | None, policy: str) -> None:
        self.app = app
        self.limits = limits
        self.hosts = hosts
        self.headers: Mapping[str, str] = {**HEADERS, "Content-Security-Policy": policy}
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        refused = self._refuse(Headers(scope=scope))
        if refused:
            await error_response(*refused)(scope, receive, send_with_headers)
            return
        self.running += 1
        try:
            await self.app(scope, self._bounded(receive), send_with_headers)
        except asyncio.CancelledError:  # the server was told to end
            if started:
                raise
            await error_response(503, "The server is ending.")(scope, receive, send_with_headers)
        finally:
            self.running -= 1

    def _refuse(self, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.hosts is not None and re.sub(r":\d*$", "", host).strip("[]").lower() not in self.hosts:
            return 403, "This server is asked by another name than its own."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Other pages may not use this server."
        length = headers.get("content-length", "0")
        if not (length.isdecimal() and len(length) < 20 and int(length) <= self.limits.upload_bytes):
            return 413, self._too_large()
        if self.running >= self.limits.requests:
            return 503, "Too many requests at a time; try again in a moment."
        return None

    def _too_large(self) -> str:
        return f"The upload is larger than {self.limits.upload_bytes / (1 << 20):g} MB."

    def _bounded(self, receive: Receive) -> Receive:
        """As `receive`, but for uploads that are too large or too slow."""
        loop = asyncio.get_running_loop()
        ends, received, complete = loop.time() + self.limits.upload_seconds, 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:  # what follows is that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), ends - loop.time())
            except (asyncio.TimeoutError, TimeoutError) as error:
                seconds = self.limits.upload_seconds
                raise HTTPException(408, f"The upload took longer than {seconds:g} seconds.") from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limits.upload_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return bounded
