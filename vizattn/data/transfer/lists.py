"""Lists of images and labels: the community's text files of VTAB-1k, and the JSON files of VPT's release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vizattn.data.folder import nearest_tree
from vizattn.errors import VizattnError

__all__ = ["LIST_FILES", "Entry", "read_list"]

LIST_FILES = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
Entry = tuple[str, int]
"""An image, absolute or relative to the task's folder with forward slashes, and its label."""

_LINE = re.compile(r"(?P<path>\S.*?)[ \t]+(?P<label>\S+)")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


def read_list(path: Path, num_classes: int) -> list[Entry]:
    """Images and labels of a text file, a line each: a path, blanks, a label.

    Backslashes in paths are taken for slashes; line ends of any system, blanks at the end, empty lines and comments
    (lines that begin with "#") are no matter. Of an absolute path, what follows the task's folder counts, so that a
    tree can be moved.

    Raises:
        VizattnError: The file cannot be read, is empty, or a line is damaged: no label, one that is no integer or no
            class, an image for the second time. The message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise VizattnError(f"There is no {path}.\n{nearest_tree(str(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise VizattnError(f"Cannot read {path}: {error}") from None
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        match = _LINE.fullmatch(line)
        if not match:
            raise VizattnError(f"{where}: expected a path and a label, such as images/test/000000.jpg 3, not {line!r}.")
        label = _label(match["label"], num_classes, where)
        name = _relative(match["path"].replace("\\", "/"), path.parent.name)
        if name in lines:
            raise VizattnError(f"{where}: {name} is also on line {lines[name]}; each image may be there once.")
        lines[name] = number
        entries.append((name, label))
    if not entries:
        raise VizattnError(f"{path} lists no image.")
    return entries


def _label(text: str, num_classes: int, where: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise VizattnError(f"{where}: the label must be an integer, not {text!r}.")
    label = int(text)
    if not 0 <= label < num_classes:
        raise VizattnError(f"{where}: the label must be 0 to {num_classes - 1}, not {label}.")
    return label


def _relative(name: str, folder: str) -> str:
    """What follows the task's folder in an absolute path, if it is in there; without "./" at the beginning."""
    if _ABSOLUTE.match(name):
        return name.rsplit(f"/{folder}/", 1)[-1]
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def demand_apart(first: Mapping[str, list[Entry]]) -> None:
    """See that no image is in two of the lists.

    Raises:
        VizattnError: One is.
    """
    seen: dict[str, str] = {}
    for file, entries in first.items():
        for name, _ in entries:
            if name in seen:
                raise VizattnError(f"{name} is in both {seen[name]} and {file}: training and validation must be apart.")
        seen.update((name, file) for name, _ in entries)
