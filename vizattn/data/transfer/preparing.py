"""Tasks of VTAB-1k made in the community's layout: drawn by definition, or drawn from a source that torchvision has."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vizattn.data.drawing import Hashed
from vizattn.data.transfer import dsprites
from vizattn.data.transfer.layouts import CLASS_FILE, LIST_FILES
from vizattn.data.transfer.sources import NEEDED, SOURCES, Pool, Pools
from vizattn.data.transfer.tasks import LAYOUTS, TransferTask
from vizattn.data.transfer.vtab import VTAB_1K
from vizattn.errors import VizattnError
from vizattn.files import explain_disk_errors
from vizattn.version import __version__

__all__ = ["PROVENANCE", "prepare"]

PROVENANCE = "provenance.json"
_NOTE = (
    "The images of train and val were selected by vizattn with the seed above: the benchmark's own selection of 800 "
    "and 200 cannot be rebuilt from this source, so results may differ from published ones by the choice of images."
)
_NOTE_ALL = " So were those of test."
_STALE_SECONDS = 24 * 3600
_CHUNK = 256  # images between two reports of progress


class _Drawn(NamedTuple):
    """A split's images, each decoded or a file, and their labels."""

    labels: list[int]
    image: Callable[[int], Path | Image.Image]


def prepare(
    task: TransferTask | str,
    out: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Make one task, whole or not at all.

    Args:
        task: A task of VTAB-1k, or its name.
        out: The root that gets `vtab-1k/<task>/`, in the community's layout, with `classes.txt` and `provenance.json`.
        source: A folder where torchvision has downloaded the source before; by default it is downloaded into
            `out/downloads`.
        seed: Of the selection.
        progress: Told the task, the number of images written, and of all.

    Returns:
        The folder of the task.

    Raises:
        VizattnError: The task cannot be made, with what is needed; it is there already; the source is missing, damaged
            or too small; the disk is full.
    """
    task = VTAB_1K.task(task) if isinstance(task, str) else task
    folder = Path(out) / VTAB_1K.name / task.name
    if task.name in NEEDED:
        raise VizattnError(
            f"{task.name} cannot be made here. It needs {NEEDED[task.name]}. Put it into {folder}: {LAYOUTS['lists']}."
        )
    if folder.exists():
        raise VizattnError(f"{folder} is there already: check it with `vizattn vtab check`, or remove it first.")
    if task.name in dsprites.TASKS:
        drawn, names, own_test = _sprites(task, seed), [str(label) for label in range(task.num_classes)], False
        origin = "drawn by the definition of dSprites (2017): its factors and their values, with outlines of our own"
    else:
        pools = _open(task, Path(out) / "downloads" if source is None else Path(source), source is None)
        drawn, names, own_test = _select(task, pools, seed), pools.class_names, "test" in pools.pools
        origin = f"torchvision's copy of the source, torchvision {_torchvision_version()}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with explain_disk_errors(folder, "choose another folder"):
        _remove_stale(folder)
        try:
            _write(task, drawn, temporary, progress)
            (temporary / CLASS_FILE).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            about = {
                "task": task.name,
                "source": origin,
                "seed": seed,
                "vizattn": __version__,
                "images": {split: len(part.labels) for split, part in drawn.items()},
                "note": _NOTE + ("" if own_test else _NOTE_ALL),
            }
            (temporary / PROVENANCE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_stale(folder: Path) -> None:
    """What processes that were killed left behind; younger folders may still be written to."""
    for path in folder.parent.glob(f".{folder.name}.*.tmp"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _torchvision_version() -> str:
    import torchvision

    return str(torchvision.__version__)


def _open(task: TransferTask, folder: Path, download: bool) -> Pools:
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
        return SOURCES[task.name](folder, download)
    except (RuntimeError, OSError, ValueError, KeyError, ImportError) as error:  # torchvision raises any of these
        what = "cannot be downloaded into" if download else "is not, or not whole, in"
        raise VizattnError(
            f"The source of {task.name} {what} {folder}: {str(error).strip() or type(error).__name__}. It must be laid "
            "out as torchvision's data set of that name does with download=True."
        ) from error


def _counts(task: TransferTask) -> tuple[int, int, int]:
    """Images of train, val and test."""
    train, val, test = (task.splits[split][0] for split in ("train", "val", "test"))
    return train, val, test


def _sprites(task: TransferTask, seed: int) -> dict[str, _Drawn]:
    train, val, test = _counts(task)
    order = dsprites.shuffled(seed)
    parts = {
        "train": order[:train],
        "val": order[train : train + val],
        "trainval": order[: train + val],
        "test": order[train + val : train + val + test],
    }

    def image(index: np.ndarray) -> Callable[[int], Image.Image]:
        return lambda place: Image.fromarray(dsprites.draw_sprites(index[place : place + 1])[0])

    return {part: _Drawn(dsprites.label_sprites(task.name, index), image(index)) for part, index in parts.items()}


def _select(task: TransferTask, source: Pools, seed: int) -> dict[str, _Drawn]:
    """Train and val in the order of a hash; the test split whole where the source has one, else after them."""
    train, val, test = _counts(task)
    pools = source.pools

    def order(part: str, needed: int) -> list[int]:
        count = len(pools[part].labels)
        if count < needed:
            raise VizattnError(f"The source of {task.name} has {count:,} images ({part}); {needed:,} are needed.")
        hashes = Hashed(f"{task.name}/{part}/{seed}", np.arange(count)).bits(1)[:, 0]
        return np.argsort(hashes, kind="stable").tolist()

    first = "all" if "all" in pools else "train"
    apart = "val" in pools
    chosen = order(first, train + (0 if apart else val) + (test if first == "all" else 0))
    from_val = order("val", val)[:val] if apart else chosen[train : train + val]
    parts = {
        "train": [(pools[first], place) for place in chosen[:train]],
        "val": [(pools["val" if apart else first], place) for place in from_val],
    }
    parts["trainval"] = parts["train"] + parts["val"]
    if first == "all":
        parts["test"] = [(pools[first], place) for place in sorted(chosen[train + val : train + val + test])]
    else:
        parts["test"] = [(pools["test"], place) for place in range(len(pools["test"].labels))]
        if len(parts["test"]) not in task.splits["test"]:
            raise VizattnError(
                f"The source of {task.name} has {len(parts['test']):,} test images, not "
                f"{' or '.join(f'{count:,}' for count in task.splits['test'])}."
            )
    return {split: _drawn(part) for split, part in parts.items()}


def _drawn(part: list[tuple[Pool, int]]) -> _Drawn:
    def image(index: int) -> Path | Image.Image:
        pool, place = part[index]
        return pool.image(place)

    return _Drawn([pool.labels[place] for pool, place in part], image)


def _write(
    task: TransferTask,
    drawn: dict[str, _Drawn],
    folder: Path,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Images (files as they are, others as PNG) and lists of every split."""
    total, done = sum(len(part.labels) for part in drawn.values()), 0
    for split, part in drawn.items():
        inside = Path("images", LIST_FILES[split].removesuffix(".txt"))
        (folder / inside).mkdir(parents=True)
        lines = []
        for index, label in enumerate(part.labels):
            image = part.image(index)
            suffix = image.suffix.lower() if isinstance(image, Path) else ".png"
            name = inside / f"{index:06}{suffix}"
            if isinstance(image, Path):
                if not image.is_file():
                    raise VizattnError(f"The source of {task.name} lacks {image}.")
                shutil.copyfile(image, folder / name)
            else:
                image.save(folder / name)
            lines.append(f"{name.as_posix()} {label}\n")
            done += 1
            if progress is not None and (done % _CHUNK == 0 or done == total):
                progress(task.name, done, total)
        (folder / LIST_FILES[split]).write_text("".join(lines), encoding="utf-8")
