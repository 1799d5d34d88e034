"""Relief of real terrain: hillshades of the elevation model of the Jacksboro fault (SRTM) that matplotlib ships."""

from __future__ import annotations

import functools

import numpy as np

from vizattn.data.drawing import Hashed
from vizattn.data.transfer.photos import cells_of, file_of

__all__ = ["CROP", "FILE", "GRADES", "terrain"]

FILE = "jacksboro_fault_dem.npz"
CROP = 24
"""Side of a crop in pixels of 90 m."""

GRADES = (161, 252, 329, 419)
"""Between the five grades: greatest minus least elevation of a crop, in metres. They part the whole map in fifths."""

_CELL = 28
_PIXEL = 90.0  # metres, three seconds of arc


def terrain(split: str, count: int) -> tuple[np.ndarray, list[int]]:
    """Hillshades uint8 (count, 24, 24) and the grades of their relief, 0 to 4; splits share no part of the map."""
    rng = Hashed(f"vtab-mini/terrain/{split}", np.arange(count))
    elevation, shade = _map()
    corners = cells_of("vtab-mini/terrain", elevation.shape, _CELL, split)
    places = corners[(rng.block(1)[:, 0] * len(corners)).astype(np.int64)]
    tops, lefts = (places + (rng.block(2) * (_CELL - CROP + 1)).astype(np.int64)).T
    images, labels = [], []
    for top, left in zip(tops, lefts):
        part = elevation[top : top + CROP, left : left + CROP]
        labels.append(int(np.searchsorted(GRADES, part.max() - part.min(), side="right")))
        images.append(shade[top : top + CROP, left : left + CROP])
    return np.stack(images), labels


@functools.cache
def _map() -> tuple[np.ndarray, np.ndarray]:
    """Elevation in metres and its hillshade uint8, both (344, 403); the sun is in the north-west, 45 degrees high."""
    with np.load(file_of(FILE)) as file:
        elevation = file["elevation"].astype(np.int64)
    down, right = np.gradient(elevation / _PIXEL)
    # Of the surface's normal (-right, -down, 1) and the direction to the sun, up and to the left.
    light = (0.5 * right + 0.5 * down + 0.5**0.5) / np.sqrt(right**2 + down**2 + 1)
    return elevation, np.rint(255 * light.clip(0, 1)).astype(np.uint8)
