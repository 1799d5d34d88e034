"""Damage to bytes, and to values of JSON: what a failing disk, a cut connection or an enemy makes of a file."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["BYTES", "IN_PLACE", "NESTED", "damage_bytes", "damage_json", "strange_values"]


def _span(data: bytes, moments: random.Random, longest: int = 600) -> tuple[int, int]:
    start = moments.randrange(len(data) + 1)
    return start, min(len(data), start + moments.randint(1, longest))


def _truncate(data: bytes, moments: random.Random) -> bytes:
    return data[: moments.randrange(len(data) + 1)]


def _cut_the_end(data: bytes, moments: random.Random) -> bytes:
    return data[: -moments.randint(1, 80)]


def _flip(data: bytes, moments: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(moments.choice((1, 1, 1, 8, 64)) if data else 0):
        place = moments.randrange(len(data))
        if moments.random() < 0.3:  # headers and ends matter most
            place = min(moments.randrange(300), len(data) - 1)
        changed[place] ^= 1 << moments.randrange(8)
    return bytes(changed)


def _insert(data: bytes, moments: random.Random) -> bytes:
    place = moments.randrange(len(data) + 1)
    return data[:place] + moments.randbytes(moments.choice((1, 2, 7, 600))) + data[place:]


def _delete(data: bytes, moments: random.Random) -> bytes:
    start, end = _span(data, moments)
    return data[:start] + data[end:]


def _duplicate(data: bytes, moments: random.Random) -> bytes:
    start, end = _span(data, moments)
    return data[:end] + data[start:end] + data[end:]


def _swap(data: bytes, moments: random.Random) -> bytes:
    (a, b), (c, d) = sorted((_span(data, moments), _span(data, moments)))
    c = max(c, b)
    d = max(d, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _lost_sector(data: bytes, moments: random.Random) -> bytes:
    place = moments.randrange(max(1, len(data))) // 512 * 512
    return data[:place] + bytes(len(data[place : place + 512])) + data[place + 512 :]


def _zeros(data: bytes, moments: random.Random) -> bytes:
    """As after a loss of power: the length is written, the content is not."""
    return bytes(len(data))


def _noise(data: bytes, moments: random.Random) -> bytes:
    return moments.randbytes(len(data))


def _append(data: bytes, moments: random.Random) -> bytes:
    return data + moments.choice((b"\0" * 512, moments.randbytes(64), data[:200]))


def _empty(data: bytes, moments: random.Random) -> bytes:
    return b""


def _words(data: bytes, moments: random.Random) -> bytes:
    """One character of a text by another that means something."""
    place = moments.randrange(max(1, len(data)))
    return (
        data[:place]
        + moments.choice((b"{", b"}", b"[", b'"', b"-", b"9" * 30, b"\n", b":", b"e9", b"\xff"))
        + data[place + 1 :]
    )


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncate,
    "end cut": _cut_the_end,
    "bits flipped": _flip,
    "inserted": _insert,
    "deleted": _delete,
    "duplicated": _duplicate,
    "swapped": _swap,
    "sector lost": _lost_sector,
    "zeros": _zeros,
    "noise": _noise,
    "appended": _append,
    "emptied": _empty,
    "a character": _words,
}
_OFTEN = ("truncated", "bits flipped", "inserted", "deleted", "a character")


def damage_bytes(data: bytes, moments: random.Random) -> tuple[str, bytes]:
    """A name of what was done, and what became of `data`."""
    name = moments.choice((*BYTES, *_OFTEN))
    return name, BYTES[name](data, moments)


NESTED = "[" * 200_000 + "]" * 200_000


def strange_values() -> list[str]:
    """JSON of values that no file of ours has, or not at most places."""
    return [
        *(
            "null",
            "true",
            "-1",
            "0",
            "1e308",
            "NaN",
            "-Infinity",
            "1" + "0" * 30,
            "9" * 5000,
            "2.5",
            '""',
            '"a"',
            "[]",
            "{}",
        ),
        *('"../../etc/passwd"', '"/dev/zero"', '"\\ud800"', '"\\u0000"', "[null]", '{"a": []}', "[[1, 2], [3]]"),
        *(
            json.dumps("x" * 100_000),
            NESTED,
            "1000000000",
            "4294967296",
            '["a", "a", "a"]',
            "[1, 2, 3]",
            "[-1, 0, 1e400]",
        ),
    ]


_HOLE = "the value goes here"


def damage_json(data: bytes, moments: random.Random) -> tuple[str, bytes]:
    """One value somewhere by a strange one, taken out, or under another name; the rest is JSON as before."""
    value = json.loads(data)
    places = [*_places(value)]
    if not places:
        return "a strange value", moments.choice(strange_values()).encode()
    path = moments.choice(places)
    changed = copy.deepcopy(value)
    here = changed
    for key in path[:-1]:
        here = here[key]
    where = ".".join(map(str, path))
    how = moments.random()
    if how < 0.1:
        del here[path[-1]]
        return f"{where} taken out", json.dumps(changed).encode()
    if how < 0.15 and isinstance(here, dict):
        here[f"{path[-1]}x"] = here.pop(path[-1])
        return f"{where} renamed", json.dumps(changed).encode()
    strange = moments.choice(strange_values())
    here[path[-1]] = _HOLE
    return f"{where} = {strange[:30]}", json.dumps(changed).replace(json.dumps(_HOLE), strange).encode()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Paths to all values inside; those high up come as often as those of a long list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, (key, entry) in enumerate(items):
        if isinstance(value, list) and place >= 4:
            break
        yield (*path, key)
        yield from _places(entry, (*path, key))


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nothing-of-this-name")


def _gone(path: Path) -> None:
    """Nothing is there."""


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


IN_PLACE: dict[str, Callable[[Path], None]] = {
    "a folder": _folder,
    "a link to itself": _loop,
    "a dangling link": _dangling,
    "nothing": _gone,
    "a pipe": _pipe,
    "an endless file": _endless,
}
"""What may be where a file should be."""
