"""dSprites drawn again by its definition: square, ellipse, heart; 6 scales, 40 orientations, 32 x 32 positions.

Binary images of 64 x 64 pixels (Matthey, Higgins, Hassabis and Lerchner, "dSprites: disentanglement testing sprites
dataset", 2017). The outlines are ours: the data set gives the values of its factors, not the polygons it drew.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from vizattn.data.drawing import Hashed

__all__ = ["COUNT", "IMAGE_SIZE", "TASKS", "draw_sprites", "label_sprites", "shuffled"]

IMAGE_SIZE = 64
_SIZES = (3, 6, 40, 32, 32)  # shape, scale, orientation, x, y: the order of the data set, the last one fastest
COUNT = math.prod(_SIZES)
"""Images in all, 737,280."""

TASKS = {"dsprites_loc": 3, "dsprites_ori": 2}
"""Each task, and which of the factors it bins into 16."""

_BINS = 16
_CHUNK = 16  # images at a time: what fits into a processor's cache
_HALF_SIDE = 11.0  # of the square at scale 1, pixels: turned or not, it stays inside the image at every position
_RADII = (15.5, 10.0)  # of the ellipse
_HEART = 12.4  # of the heart, the unit of its curve


@functools.cache
def shuffled(seed: int = 0) -> np.ndarray:
    """Every image's number in an order that is a hash of the seed, int64 (737280,)."""
    return np.argsort(Hashed(f"dsprites/{seed}", np.arange(COUNT)).bits(1)[:, 0], kind="stable")


def factors(index: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions in the values of shape, scale, orientation, x and y, each (B,)."""
    return np.unravel_index(index, _SIZES)


def label_sprites(task: str, index: np.ndarray) -> list[int]:
    """Labels 0 to 15: the bin of the task's factor."""
    factor = TASKS[task]
    return (factors(index)[factor] * _BINS // _SIZES[factor]).tolist()


def draw_sprites(index: np.ndarray) -> np.ndarray:
    """Images by their numbers, uint8 (B, 64, 64), 0 or 255: a pixel is white if its centre is inside the shape."""
    parts = [_draw(index[start : start + _CHUNK]) for start in range(0, len(index), _CHUNK)]
    return np.concatenate(parts)


def _draw(index: np.ndarray) -> np.ndarray:
    shape, scale, orientation, x, y = (values[:, None, None] for values in factors(index))
    size = np.linspace(0.5, 1, 6)[scale]
    angle = np.linspace(0, 2 * math.pi, 40)[orientation]
    low, high = IMAGE_SIZE / 4, IMAGE_SIZE * 3 / 4
    axis = np.arange(IMAGE_SIZE) + 0.5
    dx = axis - (low + (high - low) * np.linspace(0, 1, 32)[x])
    dy = axis[:, None] - (low + (high - low) * np.linspace(0, 1, 32)[y])
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / size
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / size
    inside = np.choose(shape, (_square(u, v), _ellipse(u, v), _heart(u, v)))
    return np.where(inside, np.uint8(255), np.uint8(0))


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= _HALF_SIDE


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u / _RADII[0]) ** 2 + (v / _RADII[1]) ** 2 <= 1


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The curve (x^2 + y^2 - 1)^3 = x^2 y^3 about (0, 0.25), all of it within 1.25 of there; its tip is down."""
    x, y = u / _HEART, 0.25 - v / _HEART
    return (x * x + y * y - 1) ** 3 <= x * x * y**3
