"""One clear message when the disk does not let us write."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vizattn.errors import VizattnError
from vizattn.files import write_text

__all__ = ["explain_disk_errors", "prepare_folder"]

_DISK_ERRORS = {
    errno.ENOSPC,
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


def prepare_folder(folder: Path) -> None:
    """Make `folder` and see that it can be written to.

    Raises:
        OSError: It cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ".writable", "")
    (folder / ".writable").unlink()
