"""Files written whole or not at all, and one clear message when the disk does not let us."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vizattn.errors import VizattnError

__all__ = ["explain_disk_errors", "no_empty_folder", "prepare_folder", "replacing", "write_text"]

_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.EIO,
    errno.ENOENT,
    errno.EINVAL,
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what is written there becomes `path` at the end, or vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # some writers make files that nobody else may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def explain_disk_errors(folder: Path, instead: str = "choose another folder with --work-dir") -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into one `VizattnError`; `instead` says what else to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = error.filename or folder
        raise VizattnError(
            f"Cannot write {where}: {os.strerror(error.errno or 0)}. "
            f"Free some space or {instead}; whole files already there are kept."
        ) from error


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """At the end, removes `folder` if it was made meanwhile and nothing is in it."""
    there = folder.exists()
    try:
        yield
    finally:
        if not there:
            with suppress(OSError):
                folder.rmdir()


def prepare_folder(folder: Path) -> None:
    """Make `folder` and see that it can be written to.

    Raises:
        OSError: It cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ".writable", "")
    (folder / ".writable").unlink()
