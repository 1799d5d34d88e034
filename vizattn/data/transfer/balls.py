"""Drawn scenes of balls on a plane in perspective, after CLEVR (1612.06890): how many, and how far is the nearest."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vizattn.data.drawing import Hashed

__all__ = ["DISTANCES", "FEWEST", "IMAGE_SIZE", "MOST", "draw_balls"]

IMAGE_SIZE = 64
FEWEST, MOST = 3, 10
"""Balls in a scene; the count's label is how many there are beyond the fewest."""

DISTANCES = (7.5, 8.4, 9.1, 9.8, 10.5)
"""Between the six labels of distance: from the camera to the middle of the nearest ball. About as many in each."""

_CAMERA = 4.0  # height above the plane
_PITCH = 0.47  # of the camera, downwards, in radians
_FIELD = 0.4  # tangent of half the angle of view
_ROWS, _COLUMNS = 4, 3  # of places on the plane, more than balls
_FAR = 16.0  # depth of the farthest ball
_RADII = (0.3, 0.55)
_COLOURS = np.array(
    [(87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20), (129, 74, 25), (129, 38, 192), (41, 208, 208)]
)
_LIGHT = np.array([-0.45, 0.74, -0.5])  # where it comes from, a direction of length 1
_CHUNK = 12  # scenes at a time: what fits into a processor's cache is three times as fast


class _Balls(NamedTuple):
    """Up to ten balls a scene; each field is (B, 10) or (B, 10, 3). Those of no ball are out of sight."""

    centre: np.ndarray
    radius: np.ndarray
    colour: np.ndarray
    shine: np.ndarray


def draw_balls(key: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes by number.

    Args:
        key: Of everything random.
        count: Number of scenes.

    Returns:
        Images uint8 (count, 64, 64, 3), balls in each (count,), and the distance of the nearest (count,).
    """
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    numbers, nearest = np.empty(count, dtype=np.int64), np.empty(count)
    for start in range(0, count, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, count))
        rng = Hashed(key, index)
        balls, numbers[index] = _arrange(rng)
        distance = np.linalg.norm(balls.centre - (0, _CAMERA, 0), axis=-1)
        nearest[index] = distance.min(1)
        images[index] = _render(balls, distance, rng)
    return images, numbers, nearest


def _arrange(rng: Hashed) -> tuple[_Balls, np.ndarray]:
    """Balls at places of a grid that is laid out anew for each scene, and how many."""
    number = FEWEST + (rng.block(1)[:, 0] * (MOST - FEWEST + 1)).astype(np.int64)
    near = rng.uniform(4.5, 9.5)[:, None]
    places = np.argsort(rng.block(_ROWS * _COLUMNS), 1)[:, :MOST]
    row, column = np.divmod(places, _COLUMNS)
    radius = np.array(_RADII)[(rng.block(MOST) < 0.5).astype(np.int64)]
    depth = near + (_FAR - near) * (row + 0.15 + 0.7 * rng.block(MOST)) / _ROWS
    across = (column + 0.2 + 0.6 * rng.block(MOST)) / _COLUMNS * 2 - 1
    centre = np.stack([across * depth * (0.8 * _FIELD), radius, depth], -1)
    absent = np.arange(MOST) >= number[:, None]
    centre[absent] = (1e3, 0.0, 0.0)  # far to the right
    colour = _COLOURS[(rng.block(MOST) * len(_COLOURS)).astype(np.int64)]
    return _Balls(centre, radius, colour, rng.block(MOST) < 0.5), number


def _render(balls: _Balls, distance: np.ndarray, rng: Hashed) -> np.ndarray:
    """uint8 (B, 64, 64, 3): the plane with soft shadows, then the balls from the farthest to the nearest."""
    rays = _rays()
    ground = _of(rng.uniform(120.0, 200.0))
    # Where a ray meets the plane; above the horizon, far away.
    reach = np.where(rays[..., 1] < -1e-3, -_CAMERA / np.minimum(rays[..., 1], -1e-3), 1e3).astype(np.float32)
    x, z = rays[..., 0] * reach, rays[..., 2] * reach
    light = np.exp(-(x**2 + (z - 9) ** 2) / 150)[None] * 0.5 + 0.5
    shade = np.repeat(light, len(distance), 0)
    for ball in range(MOST):
        radius, cx, cz = (_of(v[:, ball]) for v in (balls.radius, balls.centre[..., 0], balls.centre[..., 2]))
        # The shadow falls away from the light.
        dx, dz = x - cx - 0.5 * radius, z - cz - 0.5 * radius
        shade *= 1 - 0.6 * np.exp(-(((dx * dx + dz * dz) / (radius * radius)) ** 2))
    image = np.repeat((ground * shade)[..., None], 3, -1)
    order = np.argsort(-distance, 1)
    scenes = np.arange(len(distance))
    for rank in range(MOST):
        chosen = order[:, rank]
        _paint(image, rays, *(field[scenes, chosen] for field in balls))
    noise = 4 * rng.normal(IMAGE_SIZE**2).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    return np.rint((image + noise).clip(0, 255)).astype(np.uint8)


def _paint(
    image: np.ndarray, rays: np.ndarray, centre: np.ndarray, radius: np.ndarray, colour: np.ndarray, shine: np.ndarray
) -> None:
    """One ball of each scene over the image, float32 (B, 64, 64, 3), with a soft edge of a pixel."""
    middle = (centre - (0, _CAMERA, 0)).astype(np.float32)
    along = np.einsum("hwc,bc->bhw", rays, middle)
    off = np.sqrt(np.maximum(_of((middle**2).sum(1)) - along * along, 0))  # from the middle to the ray
    pixel = np.maximum(along, 0.1) * np.float32(2 * _FIELD / IMAGE_SIZE)
    cover = ((_of(radius) - off) / pixel + 0.5).clip(0, 1)
    scene, row, column = np.nonzero(cover)
    cover, along, off = (values[scene, row, column] for values in (cover, along, off))
    r = radius[scene].astype(np.float32)
    hit = along - np.sqrt(np.maximum(r * r - off * off, 0))
    normal = (rays[row, column] * hit[:, None] - middle[scene]) / r[:, None]
    facing = np.clip(normal @ _LIGHT, 0, 1)
    highlight = np.where(shine[scene], 160 * _power16(facing), 0)
    painted = (0.35 + 0.65 * facing)[:, None] * colour[scene] + highlight[:, None]
    image[scene, row, column] += cover[:, None] * (painted - image[scene, row, column])


def _rays() -> np.ndarray:
    """Directions of length 1 through the pixels, (64, 64, 3): right, up, forward."""
    axis = (np.arange(IMAGE_SIZE) + 0.5) * (2 / IMAGE_SIZE) - 1
    right, down = np.broadcast_arrays(axis * _FIELD, axis[:, None] * _FIELD)
    cos, sin = math.cos(_PITCH), math.sin(_PITCH)
    rays = np.stack([right, -down * cos - sin, cos - down * sin], -1)
    return (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).astype(np.float32)


def _of(values: np.ndarray) -> np.ndarray:
    """One number a scene, as float32 (B, 1, 1)."""
    return np.asarray(values, dtype=np.float32)[:, None, None]


def _power16(values: np.ndarray) -> np.ndarray:
    """By squaring, many times faster than the general power."""
    for _ in range(4):
        values = np.square(values)
    return values
