"""VTAB-mini: VTAB's three groups in small, from data that ships with the dependencies or is drawn; no download.

Each task has 800 training and 200 validation images, and 1,000 test images unless it says otherwise.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import numpy as np

from vizattn.data.transfer.tasks import Suite, TransferTask

__all__ = ["VTAB_MINI", "images_of"]

_SIZES = {"train": 800, "val": 200, "test": 1_000}


def _digits(split: str) -> tuple[np.ndarray, list[int]]:
    from sklearn.datasets import load_digits  # slow to import

    scans, targets = load_digits(return_X_y=True)
    order = sorted(range(len(targets)), key=lambda i: hashlib.sha256(f"vtab-mini/digits/{i}".encode()).digest())
    chosen = np.array(order[_part(split)])
    images = np.rint(scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return images, targets[chosen].tolist()


def _sprites(task: str) -> Callable[[str], tuple[np.ndarray, list[int]]]:
    def sprites(split: str) -> tuple[np.ndarray, list[int]]:
        from vizattn.data.transfer.dsprites import draw_sprites, label_sprites, shuffled

        chosen = shuffled()[_part(split)]
        return draw_sprites(chosen), label_sprites(task, chosen)

    return sprites


def _part(split: str) -> slice:
    """Where the split is in a fixed order of the images."""
    start = {"train": 0, "val": 800, "test": 1_000}[split]
    return slice(start, start + _SIZES[split])


_ROWS: dict[str, tuple[str, int, int, Callable[[str], tuple[np.ndarray, list[int]]], str]] = {
    "digits": ("natural", 10, 797, _digits, "handwritten digits of scikit-learn: the other 797 are the test split"),
    "dsprites_loc": ("structured", 16, 1_000, _sprites("dsprites_loc"), "horizontal position, 32 values in 16 bins"),
}

VTAB_MINI = Suite(
    "vtab-mini",
    tuple(
        TransferTask(
            name,
            group,
            classes,
            layout="builtin",
            splits={"train": (800,), "val": (200,), "trainval": (1_000,), "test": (test,)},
            notes=notes,
        )
        for name, (group, classes, test, _, notes) in _ROWS.items()
    ),
)


@functools.cache
def images_of(task: str, split: str) -> tuple[np.ndarray, list[int]]:
    """Images uint8 (N, H, W) or (N, H, W, 3) of "train", "val" or "test", and labels; made once in a process."""
    images, labels = _ROWS[task][3](split)
    images.flags.writeable = False
    return images, labels
