"""Steepness of real terrain, seen in the elevation model of the Jacksboro fault (SRTM) that matplotlib ships."""

from __future__ import annotations

import functools

import numpy as np

from vizattn.data.drawing import Hashed
from vizattn.data.transfer.photos import cells_of, file_of

__all__ = ["CROP", "FILE", "GRADES", "terrain"]

FILE = "jacksboro_fault_dem.npz"
CROP = 24
"""Side of a crop in pixels of 90 m."""

GRADES = (0.152, 0.203, 0.259, 0.299)
"""Between the five grades: mean slope of a crop, rise over run. They part the whole map in fifths."""

_CELL = 28
_PIXEL = 90.0  # metres, three seconds of arc


def terrain(split: str, count: int) -> tuple[np.ndarray, list[int]]:
    """Elevations as grey, uint8 (count, 24, 24), and grades of slope, 0 to 4; splits share no part of the map."""
    rng = Hashed(f"vtab-mini/terrain/{split}", np.arange(count))
    grey, slope = _map()
    corners = cells_of("vtab-mini/terrain", grey.shape, _CELL, split)
    places = corners[(rng.block(1)[:, 0] * len(corners)).astype(np.int64)]
    places += (rng.block(2) * (_CELL - CROP + 1)).astype(np.int64)
    windows = [(slice(top, top + CROP), slice(left, left + CROP)) for top, left in places]
    steepness = [slope[window].mean() for window in windows]
    return np.stack([grey[window] for window in windows]), np.searchsorted(GRADES, steepness, side="right").tolist()


@functools.cache
def _map() -> tuple[np.ndarray, np.ndarray]:
    """Elevation as uint8, from the lowest to the highest point, and slope; both (344, 403)."""
    with np.load(file_of(FILE)) as file:
        elevation = file["elevation"].astype(np.float64)
    scaled = (elevation - elevation.min()) / (elevation.max() - elevation.min())
    return np.rint(255 * scaled).astype(np.uint8), np.hypot(*np.gradient(elevation / _PIXEL))
