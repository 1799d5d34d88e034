"""Crops of pictures that ship with packages, taken for each split from parts of a picture that no other split sees."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vizattn.data.drawing import Hashed
from vizattn.data.images import load_rgb

__all__ = ["CROP", "PHOTOS", "SCIKIT_IMAGE_PHOTOS", "TEXTURES", "cells_of", "crops", "file_of", "missing_file"]

CROP = 32
"""Side of a crop in pixels."""

PHOTOS = ("china.jpg", "flower.jpg", "grace_hopper.jpg")
SCIKIT_IMAGE_PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
TEXTURES = ("brick.png", "grass.png", "gravel.png", "cell.png", "ihc.png", "moon.png", "retina.jpg")

_FOLDERS = {
    "china.jpg": ("sklearn", "datasets/images"),
    "flower.jpg": ("sklearn", "datasets/images"),
    "grace_hopper.jpg": ("matplotlib", "mpl-data/sample_data"),
    "jacksboro_fault_dem.npz": ("matplotlib", "mpl-data/sample_data"),
    **dict.fromkeys((*SCIKIT_IMAGE_PHOTOS, *TEXTURES), ("skimage", "data")),
}
_PIP_NAMES = {"sklearn": "scikit-learn", "skimage": "scikit-image"}
_SHARES = {"train": 0.4, "val": 0.2, "test": 0.4}  # of the cells


def file_of(name: str) -> Path:
    """Where a package keeps the file; it may not be there."""
    package, folder = _FOLDERS[name]
    spec = importlib.util.find_spec(package)
    parent = Path(spec.origin).parent if spec and spec.origin else Path(package)
    return parent / folder / name


def missing_file(name: str) -> str:
    """What to do about a file that is not there; "" if it is."""
    if file_of(name).is_file():
        return ""
    package = _FOLDERS[name][0]
    pip_name = _PIP_NAMES.get(package, package)
    return f"{name} of {pip_name} is not there: pip install {pip_name} (its wheel on PyPI has it)."


def cells_of(key: str, shape: tuple[int, ...], cell: int, split: str) -> np.ndarray:
    """Corners (N, 2) of the square cells of a picture (H, W, ...) that belong to the split; cells do not overlap."""
    rows, columns = shape[0] // cell, shape[1] // cell
    order = np.argsort(Hashed(key, np.arange(rows * columns)).bits(1)[:, 0])
    start = 0.0
    for name, share in _SHARES.items():
        if name == split:
            chosen = np.sort(order[round(start * len(order)) : round((start + share) * len(order))])
            return np.stack(np.divmod(chosen, columns), 1) * cell
        start += share
    raise KeyError(split)


def crops(
    task: str, names: Sequence[str], split: str, count: int, *, cell: int, grey: bool = False
) -> tuple[np.ndarray, list[int]]:
    """Crops of the named pictures, as many of each; the label is the picture's place among them.

    Half of the crops, at most as cells are large enough, are reduced by two: they show twice as much.

    Args:
        task: Of everything random.
        names: The pictures.
        split: "train", "val" or "test".
        count: Number of crops.
        cell: Side in pixels of the parts that a picture is divided into: a crop lies in one.
        grey: Without colour, brightness and contrast, which alone would tell the pictures apart.

    Returns:
        Images uint8 (count, 32, 32) if grey, else (count, 32, 32, 3), and labels.
    """
    rng = Hashed(f"vtab-mini/{task}/{split}", np.arange(count))
    labels = [index % len(names) for index in range(count)]
    place, strides = rng.block(1)[:, 0], 1 + (rng.chance(0.5) & (cell >= 2 * CROP))
    offsets = rng.block(2)
    images = []
    for index, label in enumerate(labels):
        picture = _picture(names[label])
        corners = cells_of(f"vtab-mini/{task}/{names[label]}", picture.shape, cell, split)
        corner = corners[int(place[index] * len(corners))]
        side = CROP * strides[index]
        top, left = corner + (offsets[index] * (cell - side + 1)).astype(np.int64)
        crop = picture[top : top + side, left : left + side].astype(np.float64)
        if strides[index] == 2:
            crop = crop.reshape(CROP, 2, CROP, 2, 3).mean((1, 3))
        images.append(_levelled(crop) if grey else crop)
    return np.rint(np.stack(images)).astype(np.uint8), labels


def _levelled(crop: np.ndarray) -> np.ndarray:
    luma = crop @ (0.299, 0.587, 0.114)
    return (128 + 45 * (luma - luma.mean()) / max(luma.std(), 1.0)).clip(0, 255)


@functools.cache
def _picture(name: str) -> np.ndarray:
    """uint8 (H, W, 3)."""
    return np.asarray(load_rgb(file_of(name)))
