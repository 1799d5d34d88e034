"""The compiled library for attention on a CPU: where it is, and whether it can be used.

Nothing of torch or of vizattn is imported, so that `vizattn --version` can tell at once.
"""

from __future__ import annotations

import ctypes
import os
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["VERSION", "load"]

#: Of all tasks, as in tiles.cpp: a library compiled from an older source is not used.
VERSION = 9


_OFF = ("0", "false", "no", "off")


def _whole(path: Path) -> bool:
    """Whether a library of Linux reaches to the end of its last table: loading one that does not kills Python."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":  # not of 64 bits, the least first: left to the loader
        return True
    (table,), (entry, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<2H", head, 58)
    return path.stat().st_size >= table + entry * count


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is not used."""
    asked = os.environ.get("VIZATTN_NATIVE", "")
    if asked.lower() in _OFF:
        return None, f"VIZATTN_NATIVE={asked} in the environment"
    places = [Path(__file__).parent / "attention" / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return None, "not compiled when vizattn was installed"
    if not _whole(path):
        return None, f"{path.name} is cut off; install vizattn again"
    try:
        library = ctypes.CDLL(str(path))
        library.version.restype = ctypes.c_int64
        version = library.version()
    except (OSError, AttributeError):  # of another system, or something else of this name
        return None, f"{path.name} is not a library for this system"
    if version != VERSION:
        return None, f"compiled for another version of vizattn: {version} instead of {VERSION}; install it again"
    return library, ""
