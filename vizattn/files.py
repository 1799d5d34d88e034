"""Files written whole or not at all and read with care, and one clear message when the disk does not let us."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vizattn.errors import VizattnError

__all__ = [
    "check_regular",
    "checked_file",
    "explain_disk_errors",
    "no_empty_folder",
    "parse_json",
    "prepare_folder",
    "read_json",
    "read_json_lines",
    "read_text",
    "replacing",
    "sha256_of",
    "told_in_words",
    "write_text",
    "write_with_note",
]

_CHUNK = 1 << 20

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
    """Write a small text file whole; of names of files that are no text, the odd bytes are written as ``\\udcXX``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def told_in_words(path: Path) -> Iterator[None]:
    """Makes an OSError again of what safetensors and torch say when `path` cannot be written."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        code = errno.ENOSPC if "space" in str(error) else errno.EIO
        raise OSError(code, str(error), str(path)) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_with_note(path: Path, write: Callable[[Path], object], note: Path, about: Mapping[str, Any]) -> None:
    """Write weights and the JSON beside them, which names their checksum as ``weights_sha256``; both or neither.

    Until the weights have their final name they are found by `checked_file` under another, so an interruption at any
    point leaves the old pair or the new one.

    Args:
        path: Of the weights, in a folder that is there.
        write: Writes them to the path that it is given.
        note: Of the JSON.
        about: What it says besides.
    """
    following = _following(path)
    with replacing(following) as temporary:
        write(temporary)
        sha256 = sha256_of(temporary)
    write_text(note, json.dumps({**about, "weights_sha256": sha256}, indent=2, default=str) + "\n")
    os.replace(following, path)


def checked_file(path: Path, sha256: str) -> Path | None:
    """Where the weights are that `write_with_note` wrote for `path`; None if they are not what they were.

    Raises:
        OSError: They cannot be read.
    """
    return next((place for place in (path, _following(path)) if place.is_file() and sha256_of(place) == sha256), None)


def _following(path: Path) -> Path:
    return path.with_name(f".{path.name}.next")


def check_regular(path: str | os.PathLike[str]) -> None:
    """See that reading `path` ends: a pipe may wait for ever, and a device never end.

    Raises:
        OSError: It is there, and neither a file nor a folder.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, whether it begins with a byte order mark or not.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is not UTF-8.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """The value that `text` holds; `hooks` are those of `json.loads`.

    Raises:
        ValueError: It is not JSON, is nested too deeply to be read, or has half a character, which cannot be printed.
    """
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: As `parse_json`, or it is not UTF-8.
    """
    return parse_json(read_text(path))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, as far as they are whole: a killed process may have left half a line.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    check_regular(path)
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            found.append(parse_json(line))
    return [line for line in found if isinstance(line, dict)]


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
