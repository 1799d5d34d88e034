"""Where fetched weights are kept, and the lock that lets one process at a time fetch a file."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from vizattn.errors import VizattnError

__all__ = ["cache_folder", "cached_file", "checked", "held", "kept_in", "locked"]

logger = logging.getLogger("vizattn")
_given: ContextVar[Path | None] = ContextVar("_given", default=None)


@contextmanager
def kept_in(folder: str | Path | None) -> Iterator[None]:
    """Within this, `folder` is the cache; None changes nothing."""
    token = _given.set(Path(folder).expanduser() if folder else _given.get())
    try:
        yield
    finally:
        _given.reset(token)


def cache_folder() -> Path:
    """That of `kept_in`, else ``$VIZATTN_HOME/weights``, else ``vizattn`` in torch.hub's cache; it need not exist."""
    if given := _given.get():
        return given
    if home := os.environ.get("VIZATTN_HOME"):
        return Path(home).expanduser() / "weights"
    from torch.hub import get_dir

    return Path(get_dir()) / "vizattn"


def checked(key: str) -> str:
    """`key`, which may come with a model from elsewhere, if it is fit to name a file.

    Raises:
        VizattnError: It is not.
    """
    if not re.fullmatch(r"[\w.-]+", key):
        raise VizattnError(
            f"{key!r} cannot name weights: a name and a tag have only letters, digits, '_', '-' and '.'."
        )
    return key


def cached_file(key: str) -> Path:
    """Where the converted weights `key` are or would be.

    Raises:
        VizattnError: The key cannot name a file.
    """
    return cache_folder() / f"{checked(key)}.safetensors"


@contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the lock of the weights `key`, waiting with a message while another process has it.

    Raises:
        VizattnError: The key cannot name a file.
        OSError: The cache folder cannot be made or written.
    """
    with held(cache_folder() / "locks" / f"{checked(key)}.lock", f"fetching {key}"):
        yield


@contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock `path`, waiting with a message while another process has it; a process that dies lets go.

    Raises:
        OSError: Its folder cannot be made or written.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process is %s; waiting for it.", doing)
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()
