"""Lists of images and labels: the community's text files of VTAB-1k, and the JSON files of VPT's release."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vizattn.data.folder import listed, nearest_tree
from vizattn.errors import VizattnError
from vizattn.files import parse_json, read_text

__all__ = ["Entry", "demand_apart", "demand_union", "number_labels", "read_json", "read_list"]


class Entry(NamedTuple):
    """An image, absolute or relative to the task's folder with forward slashes; its label; its line in a list, or 0."""

    name: str
    label: int
    line: int = 0


_LINE = re.compile(r"(?P<path>\S.*?)\s+(?P<label>\S+)")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


def read_list(path: Path, num_classes: int) -> list[Entry]:
    """Images and labels of a text file, a line each: a path, blanks, a label.

    Backslashes in paths are taken for slashes; line ends of any system, blanks at the end, empty lines and comments
    (lines that begin with "#") do not matter. Of an absolute path, what follows the task's folder counts, so that a
    tree can be moved.

    Raises:
        VizattnError: The file cannot be read, is empty, or a line is damaged: no label, one that is no integer or no
            class, an image for the second time. The message names every such line.
    """
    entries: list[Entry] = []
    first: dict[str, int] = {}
    problems = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            entry = _entry(line, number, path.parent.name, num_classes)
            if entry.name in first:
                raise VizattnError(f"{entry.name} is also on line {first[entry.name]}; each image may be there once.")
        except VizattnError as error:
            problems.append(f"{path}, line {number}: {error}")
            continue
        first[entry.name] = number
        entries.append(entry)
    if problems:
        raise VizattnError(problems[0] if len(problems) == 1 else f"Lines are damaged:\n{listed(problems)}")
    if not entries:
        raise VizattnError(f"{path} lists no image.")
    return entries


def _entry(line: str, number: int, folder: str, num_classes: int) -> Entry:
    match = _LINE.fullmatch(line)
    if not match:
        raise VizattnError(f"expected a path and a label, such as images/test/000000.jpg 3, not {line!r}.")
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", match["label"]):
        raise VizattnError(f"the label must be an integer, not {match['label']!r}.")
    label = int(match["label"])
    if not 0 <= label < num_classes:
        raise VizattnError(f"the label must be 0 to {num_classes - 1}, not {label}.")
    return Entry(_relative(match["path"], folder), label, number)


def read_json(path: Path) -> list[tuple[str, Any]]:
    """Images and labels of a JSON file, {"path of an image": label, ...}, as they stand there.

    Raises:
        VizattnError: The file cannot be read, is no such object, or names an image twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise VizattnError(f"{path}: {twice[0]} is there {counts[twice[0]]} times; each image may be there once.")
        return dict(pairs)

    try:
        data = parse_json(_text(path), object_pairs_hook=once)
    except VizattnError:
        raise
    except ValueError as error:
        raise VizattnError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or not data:
        raise VizattnError(f'{path} must be {{"path of an image": label, ...}}.')
    for name, label in data.items():
        if type(label) not in (int, str):
            raise VizattnError(f"{path}: the label of {name} must be an integer or a name, not {json.dumps(label)}.")
    return [(_relative(name, path.parent.name), label) for name, label in data.items()]


def number_labels(labels: Sequence[Any], num_classes: int, path: Path) -> dict[Any, int]:
    """From the labels of the training list to 0, 1, ...: as they are if all are classes already, else in their order.

    Raises:
        VizattnError: Neither: there are more or fewer than the task has classes.
    """
    distinct = set(labels)
    if distinct <= set(range(num_classes)):
        return {label: label for label in range(num_classes)}
    if len(distinct) != num_classes or len({type(label) for label in distinct}) > 1:
        raise VizattnError(
            f"{path} has {len(distinct)} different labels; the task has {num_classes} classes. Labels are 0 to "
            f"{num_classes - 1}, or {num_classes} other integers or names."
        )
    return {label: number for number, label in enumerate(sorted(distinct))}


def demand_apart(lists: Mapping[Path, Sequence[tuple[Any, ...]]]) -> None:
    """See that no image is in two of the lists, whose entries begin with its name.

    Raises:
        VizattnError: One is.
    """
    seen: dict[str, str] = {}
    for path, entries in lists.items():
        for name, *_ in entries:
            if name in seen:
                raise VizattnError(f"{name} is in {seen[name]} and in {path}: training and validation must be apart.")
        seen.update((name, path.name) for name, *_ in entries)


def demand_union(whole: Sequence[Entry], parts: Sequence[Entry], path: Path) -> None:
    """See that a list can be the union of others: as many images of each class, since the paths may differ.

    Raises:
        VizattnError: It cannot be.
    """
    given, expected = Counter(entry.label for entry in whole), Counter(entry.label for entry in parts)
    if given != expected:
        label = min(label for label in {*given, *expected} if given[label] != expected[label])
        raise VizattnError(
            f"{path} is not train and val together: it has {len(whole)} images, {given[label]} of class {label}; they "
            f"have {len(parts)}, {expected[label]} of class {label}."
        )


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        raise VizattnError(f"There is no {path}.\n{nearest_tree(str(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise VizattnError(f"Cannot read {path}: {error}") from None


def _relative(name: str, folder: str) -> str:
    """With slashes; of an absolute path what follows the task's folder, if it is in there."""
    name = name.replace("\\", "/")
    if _ABSOLUTE.match(name):
        return name.rsplit(f"/{folder}/", 1)[-1]
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name
