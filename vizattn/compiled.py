"""The compiled library for attention on a CPU: where it is, and whether it can be used.

Nothing of torch or of vizattn is imported, so that `vizattn --version` can tell at once.
"""

from __future__ import annotations

import ctypes
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["VERSION", "load"]

#: Of all tasks, as in tiles.cpp: a library compiled from an older source is not used.
VERSION = 7


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is not used."""
    if os.environ.get("VIZATTN_NATIVE") == "0":
        return None, "VIZATTN_NATIVE=0 in the environment"
    places = [Path(__file__).parent / "attention" / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return None, "not compiled when vizattn was installed"
    try:
        library = ctypes.CDLL(str(path))
        library.version.restype = ctypes.c_int64
        version = library.version()
    except (OSError, AttributeError):  # of another system, or something else of this name
        return None, f"{path.name} is not a library for this system"
    if version != VERSION:
        return None, f"compiled for another version of vizattn: {version} instead of {VERSION}; install it again"
    return library, ""
