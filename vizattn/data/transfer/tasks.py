"""What a transfer task is, and suites of them: the built-in ones' type, and a user's own from a JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vizattn.errors import VizattnError, unknown
from vizattn.files import read_json

__all__ = ["LAYOUTS", "SPLITS", "Suite", "TransferTask", "read_suite", "select_tasks"]

SPLITS = ("train", "val", "trainval", "test")
LAYOUTS = {
    "lists": "train800.txt, val200.txt, train800val200.txt and test.txt, a line an image: images/test/000000.jpg LABEL",
    "folder": "train/<class>/, val/<class>/ and test/<class>/ with images; without val/, a fifth of train/ is val",
    "json": 'train.json, val.json and test.json, each {"path of an image": label, ...}',
    "builtin": "part of the package, or drawn",
}
"""Where a task's images and labels come from: name to what it looks like inside the task's folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TransferTask:
    """One classification task.

    Attributes:
        name: Unique in its suite.
        group: Tasks of a group are averaged together.
        num_classes: Labels are 0 to this, exclusive.
        layout: A key of `LAYOUTS`.
        splits: Counts of images that "train", "val", "trainval" and "test" may have; none, or a split that is left out:
            any count. Another count is a warning.
        folder: Relative to the root; by default the name.
        class_names: Where they are known, in the order of the labels.
        notes: How labels are made, what variants exist: for people.
    """

    name: str
    group: str
    num_classes: int
    layout: str
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    folder: str = ""
    class_names: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks that are reported together, in this order."""

    name: str
    tasks: tuple[TransferTask, ...]

    @property
    def groups(self) -> list[str]:
        """The groups, in the order of the tasks."""
        return list(dict.fromkeys(task.group for task in self.tasks))

    def task(self, name: str) -> TransferTask:
        """The task of that name.

        Raises:
            VizattnError: There is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise unknown(f"task of {self.name}", name, [task.name for task in self.tasks])


def select_tasks(suite: Suite, names: str | Sequence[str] = "all") -> list[TransferTask]:
    """The tasks named, in the suite's order, each once.

    Args:
        suite: Where to choose from.
        names: Names of tasks and groups, mixed, separated by commas or as a list; "all" is every task.

    Raises:
        VizattnError: A name that is neither, or none at all.
    """
    parts = names.split(",") if isinstance(names, str) else names
    wanted = [part.strip() for part in parts if part.strip()]
    known = {"all", *suite.groups, *(task.name for task in suite.tasks)}
    for name in wanted:
        if name not in known:
            raise unknown(f"task or group of {suite.name}", name, known)
    if not wanted:
        raise VizattnError(f"No task of {suite.name} is named. Choose from: {', '.join(sorted(known))}.")
    return [task for task in suite.tasks if {"all", task.group, task.name} & set(wanted)]


def read_suite(path: str | Path) -> Suite:
    """A suite from a JSON file.

    It is {"name": ..., "tasks": [{"name": ..., "group": ..., "num_classes": ..., "layout": ...}, ...]}; a task may also
    have "folder", "splits" ({"train": 800, "test": [6084, 6085], ...}), "class_names" and "notes". The layout is
    "lists", "folder" or "json", see `LAYOUTS`.

    Raises:
        VizattnError: The file is no such suite; the message says where and what is allowed.
    """
    try:
        data = read_json(Path(path))
    except OSError as error:
        raise VizattnError(f"Cannot read the suite {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise VizattnError(f"The suite {path} is not JSON: {error}") from None
    _demand_keys(data, f"The suite {path}", required=("name", "tasks"), optional=())
    _demand(isinstance(data["name"], str) and bool(_NAME.fullmatch(data["name"])), path, "name", "a plain name", data)
    _demand(isinstance(data["tasks"], list) and bool(data["tasks"]), path, "tasks", "a list of tasks", data)
    tasks = tuple(_task(entry, f"{path}, task {number}") for number, entry in enumerate(data["tasks"], 1))
    names = [task.name for task in tasks]
    groups = {task.group for task in tasks}
    for name in names:
        if names.count(name) > 1:
            raise VizattnError(f"{path}: two tasks are named {name!r}.")
        if name == "all" or name in groups:
            raise VizattnError(f"{path}: a task cannot be named {name!r}, as that selects several.")
    return Suite(data["name"], tasks)


def _task(entry: Any, where: str) -> TransferTask:
    optional = ("folder", "splits", "class_names", "notes")
    _demand_keys(entry, where, required=("name", "group", "num_classes", "layout"), optional=optional)
    where = f"{where} ({entry['name']})"
    for key in ("name", "group"):
        good = isinstance(entry[key], str) and bool(_NAME.fullmatch(entry[key])) and entry[key] != "all"
        _demand(good, where, key, 'letters, digits, "-", "_" and ".", and not "all"', entry)
    classes = entry["num_classes"]
    _demand(type(classes) is int and classes >= 2, where, "num_classes", "an integer of at least 2", entry)
    layouts = [layout for layout in LAYOUTS if layout != "builtin"]
    if entry["layout"] not in layouts:
        raise VizattnError(f"{where}: {unknown('layout', entry['layout'], layouts)}")
    for key in ("folder", "notes"):
        _demand(isinstance(entry.get(key, ""), str), where, key, "a text", entry)
    names = entry.get("class_names", [])
    good = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) in (0, classes)
    _demand(good, where, "class_names", f"a list of {classes} names", entry)
    given = {key: value for key, value in entry.items() if key not in ("splits", "class_names")}
    return TransferTask(**given, splits=_counts(entry.get("splits", {}), where), class_names=tuple(names))


def _counts(splits: Any, where: str) -> dict[str, tuple[int, ...]]:
    _demand(isinstance(splits, dict), where, "splits", 'counts by split, such as {"train": 800}', {"splits": splits})
    counts = {}
    for split, count in splits.items():
        if split not in SPLITS:
            raise VizattnError(f"{where}: {unknown('split', split, SPLITS)}")
        accepted = count if isinstance(count, list) else [count]
        good = all(type(value) is int and value > 0 for value in accepted)
        _demand(good, where, f"splits.{split}", "a positive integer or a list of them", {f"splits.{split}": count})
        counts[split] = tuple(accepted)
    return counts


def _demand_keys(entry: Any, where: str, required: Sequence[str], optional: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise VizattnError(f"{where} must be an object with {', '.join(required)}, not {json.dumps(entry)[:60]}.")
    for key in entry:
        if key not in (*required, *optional):
            raise VizattnError(f"{where}: {unknown('key', key, (*required, *optional))}")
    if missing := [key for key in required if key not in entry]:
        raise VizattnError(f"{where} lacks {', '.join(missing)}.")


def _demand(good: bool, where: object, key: str, expected: str, entry: Mapping[str, Any]) -> None:
    if not good:
        raise VizattnError(f"{where}: {key} must be {expected}, not {json.dumps(entry[key])[:60]}.")
