"""The results file of a transfer study: one JSON line a finished cell, only ever appended to.

Several processes may share it. A line appears whole or, after a kill or on a full disk, as a torn tail that readers
leave out. Who works on what is held by locks of the operating system, which a killed process lets go of by itself.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vizattn.errors import VizattnError
from vizattn.files import check_regular, parse_json

__all__ = ["Line", "Results"]

Line = dict[str, Any]

_FORMAT = 1
_RUN = {"id": str, "versions": dict, "command": str, "weights": str, "preprocessing": dict}
_CELL: dict[str, Any] = dict.fromkeys(("cell", "suite", "task", "backbone", "method", "row", "stage"), str)
_CELL |= {"setting": dict, "adapter": dict | list | None}
_FAILED = {**_CELL, "time": float, "reason": str}
_DONE = {**_CELL, "accuracy": float, "samples": int, "params": dict, "seconds": float, "peak_memory_mb": float}


def _dumped(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True).encode()


def _crc(line: Mapping[str, Any]) -> int:
    return zlib.crc32(_dumped(line))


def _check(line: Line) -> None:
    """See that tables can be made of a line without a checksum.

    Raises:
        KeyError, TypeError: They cannot.
    """
    needed = _RUN if line["kind"] == "run" else _DONE if line["status"] == "done" else _FAILED
    values = [(line[name], kind) for name, kind in needed.items()]
    if isinstance(line.get("adapter"), list):
        values += [(entry, dict) for entry in line["adapter"]]
    if needed is _DONE:
        values += [(line["params"][which], int) for which in ("with_head", "without_head")]
    for value, kind in values:
        if not isinstance(value, int | float if kind is float else kind):
            raise TypeError(f"{value!r} is no {kind}")


class Results:
    """``results.jsonl`` in `folder`, and the locks beside it.

    A line of kind "cell" has "cell" (the key of what was computed, see `vizattn.engine.vtab.plan`) and "status", "done"
    or "failed". One of kind "run" is a configuration that cells name by its "id".
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "results.jsonl"
        self._position = 0
        self._cells: dict[str, Line] = {}
        self._new: list[Line] = []
        self._runs: dict[str, Line] = {}
        self.torn = 0
        """Lines that could not be read so far."""

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write `lines` at the end by one call, and to the disk before this returns; a known configuration not again.

        Raises:
            OSError: The disk cannot be written; then nothing of them counts.
        """
        known = set(self._runs)
        text = b""
        for line in lines:
            if line["kind"] == "run":
                if line["id"] in known:
                    continue
                known.add(line["id"])
            entry = {"format": _FORMAT, **line}
            text += _dumped({**entry, "crc": _crc(entry)}) + b"\n"
        if not text:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".results.lock"), open(self.path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # the torn tail of a killed process
                    text = b"\n" + text
            try:
                written = 0
                while written < len(text):
                    written += file.write(text[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> list[Line]:
        """Take in what was appended since the last call, by anyone; gives the new lines of cells.

        Raises:
            VizattnError: The file was written by a newer version, or it is not a file of results.
        """
        check_regular(self.path)
        try:
            with open(self.path, "rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._position += whole
        for text in data[:whole].splitlines():
            if text.strip():
                self._take(text)
        new, self._new = self._new, []
        return new

    def _take(self, text: bytes) -> None:
        try:
            line = parse_json(text)
            crc = line.pop("crc", None)
            if crc is not None and crc != _crc(line):
                raise ValueError("it is not as it was written")
            version = line["format"]
            if version > _FORMAT:
                raise VizattnError(f"{self.path} has format {version}; this version of vizattn reads up to {_FORMAT}.")
            if crc is None:  # of an older version, or by hand
                _check(line)
            if line["kind"] == "run":
                self._runs[line["id"]] = line
            elif line["status"] in ("done", "failed"):
                known = self._cells.get(line["cell"])
                if known is None or known["status"] == "failed":
                    self._cells[line["cell"]] = line
                self._new.append(line)
        except VizattnError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            self.torn += 1

    def get(self, cell: str) -> Line | None:
        """The line of a cell, as of the last `read`: the first that is done, else the last that failed."""
        return self._cells.get(cell)

    def cells(self) -> list[Line]:
        """What `get` gives for every cell."""
        return list(self._cells.values())

    def run(self, key: str) -> Line | None:
        """The configuration that cells name as `key`."""
        return self._runs.get(key)

    @contextmanager
    def claim(self, unit: str) -> Iterator[bool]:
        """Hold `unit` for this process: gives whether nobody else does. Let go of at the end, or when killed."""
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "locks" / f"{unit}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
