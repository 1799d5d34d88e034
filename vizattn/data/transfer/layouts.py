"""Where the images and labels of a task's split are, in each layout on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vizattn.data.class_names import names_in
from vizattn.data.folder import SPLIT_ALIASES, divide, nearest_tree, tree
from vizattn.data.images import find_images, hidden
from vizattn.data.transfer.lists import Entry, demand_apart, demand_union, number_labels, read_json, read_list
from vizattn.data.transfer.tasks import LAYOUTS, Suite, TransferTask
from vizattn.errors import VizattnError

__all__ = ["CLASS_FILE", "LIST_FILES", "Listing", "missing_parts", "read_split", "task_folder"]

LIST_FILES = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
CLASS_FILE = "classes.txt"
_VAL_FRACTION = 0.2  # of a folder without validation images, as in VTAB-1k's 800 and 200


class Listing(NamedTuple):
    """The images of a split, the folder they are relative to, the classes, and the file or folder that says so."""

    entries: list[Entry]
    folder: Path
    class_names: list[str]
    source: Path


def task_folder(suite: Suite, task: TransferTask, root: str | os.PathLike[str] | None) -> Path:
    """The folder of a task that is not built in; in its name, capitals, blanks, "-" and "_" do not matter.

    Raises:
        VizattnError: It is not there.
    """
    if root is None:
        raise VizattnError(f"The tasks of {suite.name} need the folder that has them: give --root DIR, or data.root.")
    folder = task.folder or task.name
    for parent in (Path(root), Path(root, suite.name)):
        if (parent / folder).is_dir():
            return Path(os.path.abspath(parent / folder))
        alike = [path for path in _folders(parent) if _plain(path.name) == _plain(folder)]
        if len(alike) == 1:
            return Path(os.path.abspath(alike[0]))
    raise VizattnError(
        f"There is no folder {folder} in {root}.\nExpected {Path(root, folder)} with {LAYOUTS[task.layout]}.\n"
        f"{nearest_tree(os.fspath(root))}"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(parent) if entry.is_dir() and not hidden(entry.name))


def missing_parts(folder: Path, task: TransferTask) -> list[str]:
    """The files or folders that the layout needs and that are not there."""
    if task.layout == "folder":
        return [f"{split}/" for split in ("train", "test") if _split_folder(folder, split) is None]
    files = [_file(folder, task, split) for split in ("train", "val", "test")]
    return [path.name for path in files if not path.is_file()]


def read_split(folder: Path, task: TransferTask, split: str) -> Listing:
    """The images of "train", "val", "trainval" or "test". The test split's are looked at for "test" only.

    Raises:
        VizattnError: Files that are missing or damaged.
    """
    return _READERS[task.layout](folder, task, split)


def _read_lists(folder: Path, task: TransferTask, split: str) -> Listing:
    def read(part: str) -> list[Entry]:
        return read_list(_file(folder, task, part), task.num_classes)

    source = _file(folder, task, split)
    if split in ("train", "test") or (split == "trainval" and not _has_parts(folder, task)):
        entries = read(split)
    else:
        train, val = read("train"), read("val")
        demand_apart({_file(folder, task, "train"): train, _file(folder, task, "val"): val})
        entries = val if split == "val" else train + val
        if split == "trainval" and source.is_file():
            entries = read(split)
            demand_union(entries, train + val, source)
        elif split == "trainval":
            source = folder
    return Listing(entries, folder, _class_names(folder, task), source)


def _has_parts(folder: Path, task: TransferTask) -> bool:
    """Whether there are train and val, or no list of both together that could stand for them."""
    parts = all(_file(folder, task, part).is_file() for part in ("train", "val"))
    return parts or not _file(folder, task, "trainval").is_file()


def _class_names(folder: Path, task: TransferTask) -> list[str]:
    if task.class_names:
        return list(task.class_names)
    path = folder / CLASS_FILE
    if not path.is_file():
        return [str(label) for label in range(task.num_classes)]
    names = names_in(path)
    if len(names) != task.num_classes:
        raise VizattnError(f"{path} has {len(names)} names; {task.name} has {task.num_classes} classes.")
    return names


def _read_json(folder: Path, task: TransferTask, split: str) -> Listing:
    parts = {"val": ("train", "val"), "trainval": ("train", "val")}.get(split, (split,))
    found = {part: read_json(_file(folder, task, part)) for part in dict.fromkeys(("train", *parts))}
    demand_apart({_file(folder, task, part): entries for part, entries in found.items()})
    first = _file(folder, task, "train")
    numbers = number_labels([label for _, label in found["train"]], task.num_classes, first)
    entries = []
    for part in ("train", "val") if split == "trainval" else (split,):
        for name, label in found[part]:
            if label not in numbers:
                path = _file(folder, task, part)
                raise VizattnError(f"{path}: the label of {name} is {label!r}, which is no label of {first.name}.")
            entries.append(Entry(name, numbers[label]))
    # VPT's lists are relative to the folder, or to the one in it that came with the images.
    inside = next((name for name in ("", "images", "Images") if (folder / name / entries[0].name).is_file()), "")
    source = folder if split == "trainval" else _file(folder, task, split)
    return Listing(entries, folder / inside, list(task.class_names) or [str(label) for label in numbers], source)


def _file(folder: Path, task: TransferTask, split: str) -> Path:
    return folder / (LIST_FILES[split] if task.layout == "lists" else f"{split}.json")


def _read_folder(folder: Path, task: TransferTask, split: str) -> Listing:
    train = _demand_folder(folder, "train")
    names = [path.name for path in _folders(train)]
    if len(names) != task.num_classes:
        raise VizattnError(
            f"{train} has {len(names)} class folders; {task.name} has {task.num_classes} classes.\n{tree(str(train))}"
        )
    parts: dict[str, list[Entry]] = {"train": _in_classes(folder, train, names)}
    if split == "test":
        parts = {"test": _in_classes(folder, _demand_folder(folder, "test"), names)}
    elif val := _split_folder(folder, "val"):
        parts["val"] = _in_classes(folder, val, names)
    else:
        parts = _divided(parts["train"])
    entries = parts["train"] + parts["val"] if split == "trainval" else parts[split]
    source = folder if split == "trainval" else _split_folder(folder, split) or train
    if not entries:
        raise VizattnError(f"There are no images of the {split} split in {source}.\n{tree(str(source))}")
    return Listing(entries, folder, list(task.class_names) or names, source)


def _split_folder(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLIT_ALIASES[split] if (folder / name).is_dir()), None)


def _demand_folder(folder: Path, split: str) -> Path:
    found = _split_folder(folder, split)
    if found is None:
        raise VizattnError(
            f"There is no folder {split} in {folder}. Expected {LAYOUTS['folder']}.\n{tree(str(folder))}"
        )
    return found


def _in_classes(folder: Path, parent: Path, names: Sequence[str]) -> list[Entry]:
    extra = [path.name for path in _folders(parent) if path.name not in names]
    if extra:
        raise VizattnError(f"{parent} has the class {extra[0]!r}, which train lacks.\n{tree(str(parent))}")
    prefix = parent.relative_to(folder).as_posix()
    return [
        Entry(f"{prefix}/{name}/{image}", label)
        for label, name in enumerate(names)
        for image in find_images(os.fspath(parent / name))
    ]


def _divided(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Train and val of images that have no validation images of their own: a fifth of each class by hash."""
    by_label: dict[int, list[str]] = {}
    for entry in entries:
        by_label.setdefault(entry.label, []).append(entry.name)
    parts: dict[str, list[Entry]] = {"train": [], "val": []}
    for label, files in by_label.items():
        train, val, _ = divide(files, _VAL_FRACTION, 0.0, seed=0)
        parts["train"] += [Entry(name, label) for name in train]
        parts["val"] += [Entry(name, label) for name in val]
    return parts


_READERS: dict[str, Callable[[Path, TransferTask, str], Listing]] = {
    "lists": _read_lists,
    "json": _read_json,
    "folder": _read_folder,
}
