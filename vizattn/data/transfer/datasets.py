"""Splits of transfer tasks as data sets."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vizattn.data.folder import listed, nearest_tree
from vizattn.data.images import load_rgb
from vizattn.data.transfer.layouts import Listing, missing_parts, read_split, task_folder
from vizattn.data.transfer.mini import images_of, missing_data
from vizattn.data.transfer.suites import get_suite
from vizattn.data.transfer.tasks import SPLITS, Suite, TransferTask
from vizattn.errors import VizattnError, unknown

__all__ = [
    "STAGES",
    "Availability",
    "DrawnSplit",
    "FileSplit",
    "available",
    "open_split",
    "open_stage",
    "stage_splits",
]

Root = str | os.PathLike[str] | None


class FileSplit(Dataset):
    """Images from files. Items are PIL RGB images (see `load_rgb`) through `transform`, and labels.

    Attributes:
        paths: Absolute paths of the images.
        labels: Class of each image.
        class_names: Names of the classes.
        transform: Applied to each image.
    """

    def __init__(self, listing: Listing, transform: Callable[[Any], Any] | None) -> None:
        self.names = [entry.name for entry in listing.entries]
        self.paths = [os.path.join(listing.folder, name) for name in self.names]
        self.labels = [entry.label for entry in listing.entries]
        self.class_names = listing.class_names
        self.transform = transform
        self._status = _status(listing, self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.paths[index]
        try:
            image = load_rgb(path)
        except OSError as error:
            raise VizattnError(f"Cannot read the image {path}: {error}") from None
        return image if self.transform is None else self.transform(image), self.labels[index]

    @functools.cached_property
    def identity(self) -> str:
        """Hash over the classes and each file's name, label, size and time of change."""
        parts = (self.class_names, list(zip(self.names, self.labels, self._status)))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def digest(self, index: int) -> str:
        """SHA-256 of the image's file."""
        return _file_digest(self.paths[index], *self._status[index])


def _status(listing: Listing, paths: list[str]) -> list[tuple[int, int]]:
    """Size and time of change of each file."""
    found, missing = [], []
    for entry, path in zip(listing.entries, paths):
        try:
            status = os.stat(path)
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            missing.append(f"{path} ({listing.source}{f', line {entry.line}' if entry.line else ''})")
    if missing:
        count = f"{len(missing):,} of {len(paths):,} images are missing:\n{listed(missing)}"
        raise VizattnError(f"{count}\n{nearest_tree(missing[0].split(' (', 1)[0])}")
    return found


@functools.lru_cache(maxsize=1 << 20)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise VizattnError(f"Cannot read the image {path}: {error.strerror or error}") from None


class DrawnSplit(Dataset):
    """Images of a built-in task, made at the first look. Items are PIL RGB images through `transform`, and labels.

    Attributes:
        class_names: Names of the classes.
        transform: Applied to each image.
    """

    def __init__(self, task: TransferTask, split: str, transform: Callable[[Any], Any] | None) -> None:
        self.task = task
        self.parts = ("train", "val") if split == "trainval" else (split,)
        self.class_names = list(task.class_names) or [str(label) for label in range(task.num_classes)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def labels(self) -> list[int]:
        """Class of each image."""
        return [label for part in self.parts for label in images_of(self.task.name, part)[1]]

    def _pixels(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        for part in self.parts:
            images, _ = images_of(self.task.name, part)
            if index < len(images):
                return images[index]
            index -= len(images)
        raise AssertionError

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self._pixels(index)).convert("RGB")
        return image if self.transform is None else self.transform(image), self.labels[index]

    @functools.cached_property
    def identity(self) -> str:
        """Hash over the classes, and each image's pixels and label."""
        digest = hashlib.sha256(repr((self.task.name, self.class_names, self.labels)).encode())
        for part in self.parts:
            digest.update(images_of(self.task.name, part)[0].tobytes())
        return digest.hexdigest()

    def digest(self, index: int) -> str:
        """SHA-256 of the image's pixels and their shape."""
        pixels = self._pixels(index)
        return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Availability:
    """True if a task can be opened; otherwise `reason` says what is missing and how to get it."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason


def open_split(
    suite: Suite | str,
    task: TransferTask | str,
    split: str,
    root: Root = None,
    transform: Callable[[Any], Any] | None = None,
) -> FileSplit | DrawnSplit:
    """One split of a task. Nothing of the test split is looked at for the others, neither its list nor its images.

    Args:
        suite: A suite, its name, or a JSON file, see `get_suite`.
        task: A task of it, or its name.
        split: "train", "val", "trainval" or "test".
        root: The folder that has the tasks' folders, or one named as the suite that has them.
        transform: Applied to each PIL RGB image.

    Raises:
        VizattnError: Unknown names; files that are missing or damaged.
    """
    suite = get_suite(suite)
    task = suite.task(task) if isinstance(task, str) else task
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if task.layout == "builtin":
        if missing := available(suite, task).reason:
            raise VizattnError(missing)
        return DrawnSplit(task, split, transform)
    listing = read_split(task_folder(suite, task, root), task, split)
    expected = task.splits.get(split, ())
    if expected and len(listing.entries) not in expected:
        counts = " or ".join(f"{count:,}" for count in expected)
        warnings.warn(
            f"{listing.source} has {len(listing.entries):,} images; {task.name} has {counts} in {split}.", stacklevel=2
        )
    return FileSplit(listing, transform)


STAGES = {"select": {"train": "train", "val": "val"}, "final": {"train": "trainval", "test": "test"}}
"""The stages of the protocol, and what is trained and evaluated on in each; the first never sees the test split."""


def stage_splits(stage: str = "select") -> dict[str, str]:
    """The splits of a stage by their part in training, such as {"train": "trainval", "test": "test"}.

    Raises:
        VizattnError: Unknown stage.
    """
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    return STAGES[stage]


def open_stage(
    split: str,
    root: Root = None,
    transform: Callable[[Any], Any] | None = None,
    suite: str = "vtab-mini",
    task_name: str | None = None,
    stage: str = "select",
) -> FileSplit | DrawnSplit:
    """A task as a recipe's data set.

    Args:
        split: "train", and "val" to select hyper-parameters or "test" for the final result.
        root: See `open_split`.
        transform: Applied to each PIL RGB image.
        suite: Name of the suite, or a JSON file.
        task_name: The task.
        stage: "select" (800 images to train on, 200 to compare with) or "final" (all 1,000, and the test split).

    Raises:
        VizattnError: No task, a split that the stage does not have, and what `open_split` raises.
    """
    chosen = get_suite(suite)
    if task_name is None:
        names = ", ".join(task.name for task in chosen.tasks)
        raise VizattnError(f"Set data.task_name to a task of {chosen.name}: {names}.")
    splits = stage_splits(stage)
    if split not in splits:
        other = next(name for name in STAGES if split in STAGES[name])
        raise VizattnError(
            f'There is no {split} split at the stage "{stage}", which has {" and ".join(splits)}; '
            f'"{other}" has one: data.stage="{other}".'
        )
    return open_split(chosen, task_name, splits[split], root, transform)


def available(suite: Suite | str, task: TransferTask | str, root: Root = None) -> Availability:
    """Whether a task's files are there; their content is not looked at."""
    suite = get_suite(suite)
    task = suite.task(task) if isinstance(task, str) else task
    if task.layout == "builtin":
        return Availability(missing_data(task.name))
    try:
        folder = task_folder(suite, task, root)
    except VizattnError as error:
        return Availability(str(error).split("\n", 1)[0])
    missing = missing_parts(folder, task)
    return Availability(f"{folder} lacks {', '.join(missing)}." if missing else "")
