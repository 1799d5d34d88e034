"""Download a file over HTTP: retried, resumed, whole or not at all."""

from __future__ import annotations

import contextlib
import email.utils
import json
import logging
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any

from vizattn.errors import VizattnError
from vizattn.files import read_json, sha256_of, write_text
from vizattn.version import __version__
from vizattn.weights.progress import shown
from vizattn.weights.reading import check_is_weights
from vizattn.weights.trust import Trusted

__all__ = ["PATIENCE", "Patience", "download", "without_login"]

logger = logging.getLogger("vizattn")

CHUNK = 1 << 18
_BUSY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long to go on trying."""

    attempts: int = 5
    """In a row without a megabyte received."""
    pause: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""
    longest: float = 60.0
    """Seconds that a server may ask us to wait."""
    timeout: float = 30.0
    """Seconds without an answer or a byte."""
    slowest: float = 100.0
    """Bytes a second below which a server counts as stalled."""


PATIENCE = Patience()


class _Later(Exception):
    """Worth another attempt, after `pause` seconds where the server says so."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _Never(Exception):
    """No use trying this address again."""


def download(
    urls: Sequence[str], target: Path, trusted: Trusted, title: str, patience: Patience | None = None
) -> tuple[str, str]:
    """Download `target` from the first of `urls` that has it; what an interrupted call left is used.

    Args:
        urls: Addresses of the same file, in the order to try.
        target: Where it goes. ``.part`` beside it holds what has arrived, ``.part.json`` which version that is.
        trusted: The size and hash the file must have.
        title: What the progress bar says.
        patience: How long to try.

    Returns:
        The address, without a login in it, and the file's SHA-256.

    Raises:
        VizattnError: No address gave the file; it says why, for each.
        OSError: It cannot be written.
    """
    reasons = []
    for url in urls:
        try:
            with shown(title) as show:
                return without_login(url), _Download(url, target, trusted, patience or PATIENCE, show).run()
        except _Never as error:
            reasons.append(f"{without_login(url)}: {error}.")
            if url != urls[-1]:
                logger.warning("%s Trying %s instead.", reasons[-1], without_login(urls[-1]))
    raise VizattnError(" ".join(reasons))


def without_login(url: str) -> str:
    """An address to show and to store: without ``user:password@``."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + path


class _Download:
    """One address, tried until the file is there or there is no use."""

    def __init__(
        self, url: str, target: Path, trusted: Trusted, patience: Patience, show: Callable[[int, int | None], None]
    ) -> None:
        self.url, self.target, self.trusted, self.patience, self.show = url, target, trusted, patience, show
        self.part = target.with_name(f"{target.name}.part")
        self.note = target.with_name(f"{target.name}.part.json")
        self.resumed = False
        self.whole = False
        """Parts did not fit together: from now on each request is for the whole file."""

    def run(self) -> str:
        import requests

        with requests.Session() as session:
            session.max_redirects = 10
            session.headers.update({"User-Agent": f"vizattn/{__version__}", "Accept-Encoding": "identity"})
            try:
                return self._persist(session)
            except KeyboardInterrupt:
                kept = self._resumable()[0]
                then = f"{kept / 1e6:.1f} MB are kept, the next call goes on there" if kept else "nothing is kept"
                logger.warning("Stopped fetching %s; %s.", without_login(self.url), then)
                raise

    def _persist(self, session: Any) -> str:
        failures = 0
        while True:
            before = self._arrived()
            try:
                while not self._receive(session):
                    pass  # a server that gives less at a time than asked for
                return self._finish()
            except _Later as error:
                progress = self._arrived() - before >= 1_000_000 and not self.whole
                failures = 1 if progress else failures + 1
                if failures >= self.patience.attempts:
                    raise _Never(f"{error}, {failures} times in a row") from error
                pause = self.patience.pause * 2 ** (failures - 1) if error.pause is None else error.pause
                if pause > self.patience.longest:
                    raise _Never(f"{error}; the server asks to come back in {pause:.0f} s") from error
                logger.warning("%s: %s. Trying again in %.0f s.", without_login(self.url), error, pause)
                time.sleep(pause)

    def _receive(self, session: Any) -> bool:
        """One request: append to the part, or begin it anew. Whether the part is whole then."""
        import requests
        from urllib3.exceptions import HTTPError

        offset, validator = (0, None) if self.whole else self._resumable()
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and validator:
            headers["If-Range"] = validator
        try:
            with session.get(self.url, headers=headers, stream=True, timeout=self.patience.timeout) as response:
                start = self._accept(response, offset)
                return start is None or self._append(response, start)
        except requests.TooManyRedirects as error:
            raise _Never("it redirects in a loop") from error
        except requests.Timeout as error:
            raise _Later(f"no answer within {self.patience.timeout:g} s") from error
        except requests.exceptions.ProxyError as error:
            proxy = requests.utils.select_proxy(self.url, requests.utils.get_environ_proxies(self.url))
            raise _Later(f"the proxy {without_login(proxy or '')} cannot be used ({_last(error)})") from error
        except (requests.RequestException, HTTPError, ValueError) as error:
            if isinstance(_innermost(error), ssl.SSLCertVerificationError):
                raise _Never(f"its certificate is not accepted ({_last(error)})") from error
            if isinstance(error, ValueError):  # InvalidURL, MissingSchema and their like
                raise _Never(f"this is no address to download from ({_last(error)})") from error
            raise _Later(f"the connection failed ({_last(error)})") from error

    def _accept(self, response: Any, offset: int) -> int | None:
        """Where the body belongs in the part; None if the part is whole already."""
        status, headers = response.status_code, response.headers
        open_urls = [hop.url for hop in (*response.history, response) if not hop.url.startswith("https:")]
        if self.url.startswith("https:") and open_urls:
            raise _Never(f"it redirects to an address without encryption, {without_login(open_urls[0])}")
        if status == 416 and offset:
            if headers.get("Content-Range") == f"bytes */{offset}":
                self.resumed = True
                return None
            raise self._misfit("the file has changed")
        if status in _BUSY:
            raise _Later(f"the server answers {status} {response.reason}", _retry_after(headers.get("Retry-After")))
        if status not in (200, 206):
            hint = {401: ", it wants a login", 403: ", it gives no permission", 404: ", there is no such file"}
            raise _Never(f"the server answers {status} {response.reason}{hint.get(status, '')}")
        if headers.get("Content-Type", "").startswith("text/html"):
            raise _Never("the server sent a web page instead of a file: a login, or a share that is gone")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _Never(f"the server sent it compressed by {headers['Content-Encoding']}, which was not asked for")
        if status == 200:
            return 0
        start = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if start != str(offset):
            raise self._misfit(f"the server sent another part than asked for ({headers.get('Content-Range')})")
        return offset

    def _append(self, response: Any, offset: int) -> bool:
        """Write the body; whether the file is whole then, False where the server has more of it."""
        length = response.headers.get("Content-Length", "")
        end = total = offset + int(length) if length.isdigit() else None
        given = re.fullmatch(r"bytes \d+-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code == 206 and given:
            end, total = int(given[1]) + 1, int(given[2])
        if total is not None and self.trusted.size not in (None, total):
            raise _Never(f"the file has {total} bytes instead of {self.trusted.size}, says {self.trusted.according_to}")
        if total is not None and shutil.disk_usage(self.part.parent).free < total - offset:
            raise OSError(ENOSPC, f"No space left on device for {total - offset:,} bytes", str(self.part))
        if not offset:
            self._remember(response.headers)
        self.resumed = offset > 0
        read = getattr(response.raw, "read1", response.raw.read)  # as it comes: a trickle must not look like silence
        done, mark, since = offset, offset, time.monotonic()
        with open(self.part, "r+b" if offset else "wb") as file:
            file.seek(offset)
            while chunk := read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                self.show(done, total)
                if (passed := time.monotonic() - since) > self.patience.timeout:
                    if (done - mark) / passed < self.patience.slowest:
                        raise _Later(f"the server sends less than {self.patience.slowest:g} bytes a second")
                    mark, since = done, time.monotonic()
        if total is None or done >= total:
            return True
        if offset < done == end and not self.whole and self._resumable()[0] == done:
            return False
        raise _Later(f"the connection ended after {done} of {total} bytes")

    def _finish(self) -> str:
        """Check the part and give it its name."""
        sha256 = sha256_of(self.part)
        try:
            check_is_weights(self.part)
            self.trusted.check("the file", self._arrived(), sha256)
        except VizattnError as error:
            if self.resumed:  # the beginning may have been of another version
                raise self._misfit("the parts do not fit together") from error
            self._discard()
            raise _Never(str(error).replace(self.part.name, "what the server sent").rstrip(".")) from error
        os.replace(self.part, self.target)
        self._discard()
        return sha256

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _resumable(self) -> tuple[int, str | None]:
        """Bytes of the part to keep, and the validator of their version.

        With a known hash the bytes may be of any address: the end shows whether they were right.
        """
        note: Any = None
        with contextlib.suppress(OSError, ValueError):
            note = read_json(self.note)
        ours = isinstance(note, dict) and note.get("url") == without_login(self.url)
        validator = note["validator"] if ours and isinstance(note.get("validator"), str) else None
        return (self._arrived() if validator or self.trusted.sha256 else 0), validator

    def _remember(self, headers: Any) -> None:
        etag = headers.get("ETag", "")
        strong = etag if etag.startswith('"') else None  # If-Range takes no weak ones
        validator = strong or headers.get("Last-Modified")
        self.part.unlink(missing_ok=True)
        write_text(self.note, json.dumps({"url": without_login(self.url), "validator": validator}))

    def _misfit(self, reason: str) -> _Later:
        """The part is of no use: without it, at once."""
        self._discard()
        self.whole = True
        return _Later(reason, pause=0)

    def _discard(self) -> None:
        for path in (self.part, self.note):
            path.unlink(missing_ok=True)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None if there is neither."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _innermost(error: BaseException) -> Any:
    """The first cause: requests wraps urllib3, which wraps the socket."""
    reason: Any = error
    while inner := getattr(reason, "reason", None) or next((a for a in reason.args if isinstance(a, Exception)), None):
        if not isinstance(inner, Exception):
            break
        reason = inner
    return reason


def _last(error: BaseException) -> str:
    """The innermost reason, in words."""
    reason = _innermost(error)
    return str(reason).rpartition(">: ")[2].rstrip(".") or type(reason).__name__
