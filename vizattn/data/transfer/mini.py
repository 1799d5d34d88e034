"""VTAB-mini: VTAB's three groups in small, from data that ships with the dependencies or is drawn; no download.

Each task has 800 training and 200 validation images, and 1,000 test images but for the digits. A second suite of two
tasks is cut from pictures of scikit-image, and is there where that is installed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vizattn.data.drawing import Hashed
from vizattn.data.transfer import balls, dsprites, photos, terrain
from vizattn.data.transfer.tasks import Suite, TransferTask

__all__ = ["VTAB_MINI", "VTAB_MINI_SKIMAGE", "images_of", "missing_data"]

_SIZES = {"train": 800, "val": 200, "test": 1_000}
Images = tuple[np.ndarray, list[int]]
"""Images uint8 (N, H, W) or (N, H, W, 3), and their labels."""


@dataclass(frozen=True)
class _Row:
    group: str
    class_names: tuple[str, ...]
    make: Callable[[str], Images]
    notes: str
    files: tuple[str, ...] = ()
    test: int = _SIZES["test"]


_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho final-sigma sigma tau"
_GREEK += " upsilon phi chi psi omega"
_ALPHA = 0x3B1  # the others follow it
_STIX = ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf")


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits  # slow to import

    scans, targets = load_digits(return_X_y=True)
    order = sorted(range(len(targets)), key=lambda i: hashlib.sha256(f"vtab-mini/digits/{i}".encode()).digest())
    chosen = np.array(order[_part(split)])
    images = np.rint(scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return images, targets[chosen].tolist()


def _crops(task: str, names: tuple[str, ...], cell: int, grey: bool) -> Callable[[str], Images]:
    return lambda split: photos.crops(task, names, split, _SIZES[split], cell=cell, grey=grey)


def _fonts(split: str) -> Images:
    from vizattn.data.glyphs import draw_letters

    letters = len(_GREEK.split())
    index = np.arange(_SIZES[split])
    rng = Hashed(f"vtab-mini/fonts/{split}", index)
    tiles = _greek_tiles()[rng.choice(np.full(len(_STIX), 1 / len(_STIX))), index % letters]
    return draw_letters(tiles, rng).permute(0, 2, 3, 1).numpy(), (index % letters).tolist()


@functools.cache
def _greek_tiles() -> np.ndarray:
    """uint8 (faces, 25, 64, 64)."""
    from vizattn.data.glyphs import Face, render_letters

    letters = [chr(_ALPHA + place) for place in range(len(_GREEK.split()))]
    return np.stack([render_letters(Face(file, file), letters) for file in _STIX])


def _terrain(split: str) -> Images:
    return terrain.terrain(split, _SIZES[split])


def _sprites(task: str) -> Callable[[str], Images]:
    def sprites(split: str) -> Images:
        chosen = dsprites.shuffled()[_part(split)]
        return dsprites.draw_sprites(chosen), dsprites.label_sprites(task, chosen)

    return sprites


def _count(split: str) -> Images:
    images, numbers, _ = balls.draw_balls(f"vtab-mini/count/{split}", _SIZES[split])
    return images, (numbers - balls.FEWEST).tolist()


def _distance(split: str) -> Images:
    images, _, nearest = balls.draw_balls(f"vtab-mini/distance/{split}", _SIZES[split])
    return images, np.searchsorted(balls.DISTANCES, nearest, side="right").tolist()


def _part(split: str) -> slice:
    """Where the split is in a fixed order of the images."""
    start = {"train": 0, "val": 800, "test": 1_000}[split]
    return slice(start, start + _SIZES[split])


def _numbers(count: int, first: int = 0) -> tuple[str, ...]:
    return tuple(str(first + place) for place in range(count))


def _stems(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.split(".")[0] for name in names)


_BINS = _numbers(16)
_ROWS = {
    "digits": _Row(
        "natural", _numbers(10), _digits, "handwritten digits of scikit-learn; what is left is the test split", test=797
    ),
    "photo_crops": _Row(
        "natural",
        _stems(photos.PHOTOS),
        _crops("photo_crops", photos.PHOTOS, cell=72, grey=True),
        "which of the three photographs of scikit-learn and matplotlib a grey crop is from",
        files=photos.PHOTOS,
    ),
    "fonts": _Row(
        "natural",
        tuple(_GREEK.split()),
        _fonts,
        "small Greek letters in four STIX serif faces, drawn as the glyphs are; "
        "neither the letters nor the faces are in the training glyphs",
    ),
    "terrain": _Row(
        "specialized",
        tuple(f"steepness {grade}" for grade in range(5)),
        _terrain,
        "mean slope of real terrain in five grades, from elevations around the Jacksboro fault that matplotlib ships",
        files=(terrain.FILE,),
    ),
    "dsprites_loc": _Row(
        "structured", _BINS, _sprites("dsprites_loc"), "drawn: horizontal position, 32 values in 16 bins"
    ),
    "dsprites_ori": _Row("structured", _BINS, _sprites("dsprites_ori"), "drawn: orientation, 40 values in 16 bins"),
    "count": _Row(
        "structured", _numbers(8, balls.FEWEST), _count, "drawn: number of balls on a plane, 3 to 10, minus 3"
    ),
    "distance": _Row(
        "structured",
        _numbers(len(balls.DISTANCES) + 1),
        _distance,
        f"drawn: distance of the nearest ball, thresholds {', '.join(map(str, balls.DISTANCES))}",
    ),
}
_ALL_PHOTOS = photos.PHOTOS + photos.SCIKIT_IMAGE_PHOTOS
_SKIMAGE_ROWS = {
    "photos": _Row(
        "natural",
        _stems(_ALL_PHOTOS),
        _crops("photos", _ALL_PHOTOS, cell=72, grey=True),
        "which of nine photographs a grey crop is from",
        files=_ALL_PHOTOS,
    ),
    "textures": _Row(
        "specialized",
        _stems(photos.TEXTURES),
        _crops("textures", photos.TEXTURES, cell=64, grey=True),
        "which texture or scientific picture a grey crop is from",
        files=photos.TEXTURES,
    ),
}


def _suite(name: str, rows: dict[str, _Row]) -> Suite:
    return Suite(
        name,
        tuple(
            TransferTask(
                task,
                row.group,
                len(row.class_names),
                layout="builtin",
                splits={"train": (800,), "val": (200,), "trainval": (1_000,), "test": (row.test,)},
                class_names=row.class_names,
                notes=row.notes,
            )
            for task, row in rows.items()
        ),
    )


VTAB_MINI = _suite("vtab-mini", _ROWS)
VTAB_MINI_SKIMAGE = _suite("vtab-mini-skimage", _SKIMAGE_ROWS)


def missing_data(task: str) -> str:
    """What is missing for a built-in task, and how to get it; "" if all is there."""
    reasons = (photos.missing_file(name) for name in (_ROWS | _SKIMAGE_ROWS)[task].files)
    return next((reason for reason in reasons if reason), "")


@functools.cache
def images_of(task: str, split: str) -> Images:
    """The images of "train", "val" or "test"; made once in a process."""
    images, labels = (_ROWS | _SKIMAGE_ROWS)[task].make(split)
    images.flags.writeable = False
    return images, labels
