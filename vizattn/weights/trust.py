"""Which file is the right one: known hashes in the package, and those a user saw first in a lock file.

`manifest.json` names a file for each released set of weights, ``name.tag``, with its size in bytes and SHA-256 where
they are known. Where they are not, the first fetch is trusted and written to the lock file, and any other file is
refused from then on. A lock file under version control makes all machines of a project use the same weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from vizattn.errors import VizattnError
from vizattn.files import read_json, write_text
from vizattn.weights.place import cache_folder, held

__all__ = ["Trusted", "lock_file", "manifest", "record", "trusted"]


@dataclass(frozen=True)
class Trusted:
    """The right file: its size in bytes and SHA-256, as far as they are known, and who says so."""

    size: int | None = None
    sha256: str | None = None
    according_to: str = ""

    def check(self, what: str, size: int, sha256: str) -> None:
        """Raise unless a file has this size and hash.

        Raises:
            VizattnError: It has not.
        """
        if size != (self.size or size) or sha256 != (self.sha256 or sha256):
            raise VizattnError(
                f"{what} is not the right one: it has {size} bytes and SHA-256 {sha256}, but {self.according_to} says "
                f"{self.size or size} bytes and SHA-256 {self.sha256 or 'unknown'}."
            )


@lru_cache(maxsize=1)
def manifest() -> dict[str, dict[str, Any]]:
    """``name.tag`` -> ``{"file", "size", "sha256"}``, the latter two None where they are unknown."""
    entries: dict[str, dict[str, Any]] = json.loads((files("vizattn.weights") / "manifest.json").read_text("utf-8"))
    return entries


def lock_file() -> Path:
    """The file of `VIZATTN_LOCK`, else `weights.lock.json` in the cache folder."""
    if given := os.environ.get("VIZATTN_LOCK"):
        return Path(given).expanduser()
    return cache_folder() / "weights.lock.json"


def _recorded() -> dict[str, dict[str, Any]]:
    path = lock_file()
    try:
        entries = read_json(path)
        if not all(isinstance(entry["sha256"], str) and isinstance(entry["size"], int) for entry in entries.values()):
            raise TypeError("an entry without size or sha256")
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VizattnError(
            f"The lock file of weights {path} is damaged: {error}. Repair it, or remove it to trust anew."
        ) from error
    return dict(entries)


def trusted(key: str) -> Trusted:
    """What is known of the file of `key`.

    Raises:
        VizattnError: The lock file is damaged.
    """
    known = manifest().get(key, {})
    if known.get("sha256"):
        return Trusted(known["size"], known["sha256"], "vizattn's manifest")
    if entry := _recorded().get(key):
        who = f"the lock file {lock_file()} (take its entry out if the file was replaced on purpose)"
        return Trusted(entry["size"], entry["sha256"], who)
    return Trusted(known.get("size"), None, "vizattn's manifest")


def record(key: str, source: str, size: int, sha256: str) -> None:
    """Trust this file from now on, unless the manifest already says which is right.

    Raises:
        OSError: The lock file cannot be written.
    """
    if manifest().get(key, {}).get("sha256"):
        return
    path = lock_file()
    with held(path.with_name(f"{path.name}.lock"), f"writing {path}"):  # beside it: other caches may share it
        entries = _recorded()
        entries[key] = {"source": source, "size": size, "sha256": sha256}
        write_text(path, json.dumps(entries, indent=2, sort_keys=True) + "\n")
