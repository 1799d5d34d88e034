"""A look at the tasks of a suite before they are used: files, counts, labels, pictures, and images in two splits."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vizattn.data.folder import listed
from vizattn.data.images import unreadable
from vizattn.data.transfer.datasets import DrawnSplit, FileSplit, Root, available, open_split
from vizattn.data.transfer.suites import get_suite
from vizattn.data.transfer.tasks import SPLITS, Suite, TransferTask, select_tasks
from vizattn.errors import VizattnError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["SplitFindings", "TaskFindings", "check", "render"]

Progress = Callable[[str, int, int], None]
"""Told the task, how many of its images were read, and how many there are."""

_CHUNK = 512  # images read between two reports of progress


@dataclass
class SplitFindings:
    """What one split holds.

    Attributes:
        images: How many.
        labels: The least and the greatest.
        histogram: Images of each class.
        heights: Least, median and greatest in pixels; None if not looked at.
        widths: The same.
    """

    images: int
    labels: tuple[int, int]
    histogram: list[int]
    heights: tuple[int, int, int] | None = None
    widths: tuple[int, int, int] | None = None

    @property
    def missing_classes(self) -> list[int]:
        """Classes without an image."""
        return [label for label, count in enumerate(self.histogram) if not count]


@dataclass
class TaskFindings:
    """What `check` found out about one task.

    Attributes:
        task: Its name.
        group: Its group.
        splits: By name, those that could be opened.
        missing: Why the task is not there; "" if it is.
        errors: What must be repaired, in sentences.
        warnings: What may be right, but is not as usual.
        unreadable: Image files that cannot be decoded, each with the reason.
    """

    task: str
    group: str
    splits: dict[str, SplitFindings] = field(default_factory=dict)
    missing: str = ""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """ "missing", "errors", "warnings" or "ok"."""
        if self.missing:
            return "missing"
        return "errors" if self.errors else "warnings" if self.warnings else "ok"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {**asdict(self), "status": self.status}


def check(
    suite: Suite | str,
    root: Root = None,
    tasks: str | Sequence[str] = "all",
    decode: bool = True,
    progress: Progress | None = None,
) -> list[TaskFindings]:
    """Open every split of the tasks and say what is wrong; a task that is not there is one of the findings.

    Args:
        suite: A suite, its name, or a JSON file.
        root: See `open_split`.
        tasks: See `select_tasks`.
        decode: Also read and decode every image, and compare images by content. Otherwise only their files are
            looked up.
        progress: Called as images are read.

    Raises:
        VizattnError: Unknown suite or task.
    """
    suite = get_suite(suite)
    return [_check(suite, task, root, decode, progress) for task in select_tasks(suite, tasks)]


def _check(suite: Suite, task: TransferTask, root: Root, decode: bool, progress: Progress | None) -> TaskFindings:
    found = TaskFindings(task.name, task.group, missing=available(suite, task, root).reason)
    if found.missing:
        return found
    opened: dict[str, FileSplit | DrawnSplit] = {}
    for split in SPLITS:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            try:
                opened[split] = open_split(suite, task, split, root)
            except VizattnError as error:
                if str(error) not in found.errors:  # a damaged list is read for more than one split
                    found.errors.append(str(error))
        found.warnings += [str(remark.message) for remark in remarks]
    for split, dataset in opened.items():
        histogram = np.bincount(dataset.labels, minlength=task.num_classes).tolist()
        found.splits[split] = SplitFindings(len(dataset), (min(dataset.labels), max(dataset.labels)), histogram)
        if split != "val" and (absent := found.splits[split].missing_classes):
            found.warnings.append(
                f"{split} has no image of {_shown([dataset.class_names[label] for label in absent])}."
            )
    if decode:
        report = _reporter(task.name, opened, progress)
        for split, dataset in opened.items():
            if isinstance(dataset, FileSplit):
                _look(dataset, found.splits[split], found.unreadable, report)
        if found.unreadable:
            lines = listed(f"{path}: {reason}" for path, reason in found.unreadable.items())
            found.errors.append(f"{len(found.unreadable)} images cannot be read:\n{lines}")
        _compare(opened, found, report)
    return found


def _shown(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{'class' if len(names) == 1 else 'classes'} {', '.join(names[:most])}{rest}"


def _reporter(task: str, opened: dict[str, FileSplit | DrawnSplit], progress: Progress | None) -> Callable[[int], None]:
    """Counts what is read: each image of a file twice, to decode and to compare."""
    total = sum(len(dataset) * (1 + isinstance(dataset, FileSplit)) for dataset in opened.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(task, done, total)

    return report


def _look(dataset: FileSplit, found: SplitFindings, bad: dict[str, str], report: Callable[[int], None]) -> None:
    """Decodes the images, and notes their sizes."""
    sizes: list[tuple[int, int]] = []
    for paths in _chunks(dataset.paths):
        problems = unreadable(paths, whole=True)
        bad.update(problems)
        with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
            sizes += pool.map(_size, [path for path in paths if path not in problems])
        report(len(paths))
    if sizes:
        widths, heights = np.array(sizes).T
        found.widths, found.heights = _range(widths), _range(heights)


def _size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _range(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _chunks(paths: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(paths), _CHUNK):
        yield paths[start : start + _CHUNK]


def _compare(opened: dict[str, FileSplit | DrawnSplit], found: TaskFindings, report: Callable[[int], None]) -> None:
    """Looks for images of the same content in two splits, and sees that trainval is train and val together."""
    contents: dict[str, Counter[tuple[str, int]]] = {}
    for split, dataset in opened.items():
        contents[split] = Counter()
        for index, label in enumerate(dataset.labels):
            contents[split][dataset.digest(index), label] += 1
            if (index + 1) % _CHUNK == 0 or index + 1 == len(dataset):
                report((index % _CHUNK) + 1)
    if {"train", "val", "trainval"} <= contents.keys():
        whole, parts = contents["trainval"], contents["train"] + contents["val"]
        if whole != parts:
            found.errors.append(
                "trainval is not train and val together: "
                f"{(parts - whole).total()} of their images are not in it with the same label, and it has "
                f"{(whole - parts).total()} others."
            )
    images = {split: {digest for digest, _ in counts} for split, counts in contents.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if same := len(images.get(first, set()) & images.get(second, set())):
            found.warnings.append(f"{same} images of {second} have the same content as one of {first}.")
    labels: dict[str, set[int]] = {}
    for counts in contents.values():
        for digest, label in counts:
            labels.setdefault(digest, set()).add(label)
    if twice := sum(len(own) > 1 for own in labels.values()):
        found.warnings.append(f"{twice} images of the same content have different labels.")


def render(found: Sequence[TaskFindings]) -> RenderableType:
    """For rich: a table with a row a task, a line between groups, then what is wrong in sentences."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for title in (*SPLITS, "labels", "pixels"):
        table.add_column(title, justify="right")
    colours = {"ok": "green", "warnings": "yellow", "errors": "red", "missing": "dim"}
    for task, following in zip(found, [*found[1:], None]):
        counts = [f"{task.splits[split].images:,}" if split in task.splits else "-" for split in SPLITS]
        status = Text(task.status, colours[task.status])
        last = following is None or following.group != task.group
        table.add_row(task.task, status, *counts, _labels(task), _pixels(task), end_section=last)
    lines: list[RenderableType] = [table]
    for task in found:
        sentences = [("missing", task.missing)] if task.missing else []
        sentences += [("error", sentence) for sentence in task.errors]
        sentences += [("warning", sentence) for sentence in task.warnings]
        lines += [Text(f"{task.task}: {kind}: {sentence}") for kind, sentence in sentences]
    return Group(*lines)


def _labels(task: TaskFindings) -> str:
    ranges = [split.labels for split in task.splits.values()]
    return f"{min(low for low, _ in ranges)}-{max(high for _, high in ranges)}" if ranges else "-"


def _pixels(task: TaskFindings) -> str:
    """Least and greatest height and width of all splits."""
    known = [(split.heights, split.widths) for split in task.splits.values() if split.heights and split.widths]
    if not known:
        return "-"
    least = "x".join(str(min(sizes[side][0] for sizes in known)) for side in (0, 1))
    greatest = "x".join(str(max(sizes[side][2] for sizes in known)) for side in (0, 1))
    return least if least == greatest else f"{least} to {greatest}"
