"""Parts of the data sets that are drawn: random numbers by hashing, fonts, signed distances, smooth fields."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFont
from torch import Tensor

__all__ = ["Hashed", "column", "load_font", "signed_distance", "smooth_fields"]


class Hashed:
    """Random numbers that are a hash of (key, index, how many were asked for before): the SplitMix64 sequence.

    Args:
        key: Of the whole sequence.
        index: One image each, (B,); every method gives B rows, each of which depends on its own index alone.
    """

    def __init__(self, key: str, index: np.ndarray) -> None:
        start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        with np.errstate(over="ignore"):
            self.state = _mix(np.uint64(start) + index.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))
        self.used = 1

    def bits(self, n: int) -> np.ndarray:
        """Random uint64, (B, n)."""
        steps = np.arange(self.used, self.used + n, dtype=np.uint64)
        self.used += n
        with np.errstate(over="ignore"):
            return _mix(self.state[:, None] + steps * np.uint64(0x9E3779B97F4A7C15))

    def block(self, n: int) -> np.ndarray:
        """Uniform in [0, 1), (B, n)."""
        return (self.bits(n) >> np.uint64(11)) * 2.0**-53

    def normal(self, n: int) -> np.ndarray:
        """Close to a standard normal, (B, n): the sum of four uniforms."""
        quarters = self.bits(n).view(np.uint16).reshape(len(self.state), n, 4)
        return (quarters.sum(-1, dtype=np.float64) * 2.0**-16 - 2) * 3**0.5

    def uniform(self, low: float, high: float) -> np.ndarray:
        """Uniform in [low, high), (B,)."""
        return low + (high - low) * self.block(1)[:, 0]

    def chance(self, probability: float) -> np.ndarray:
        """True with this probability, (B,)."""
        return self.block(1)[:, 0] < probability

    def sign(self) -> np.ndarray:
        """1.0 or -1.0, (B,)."""
        return np.where(self.chance(0.5), 1.0, -1.0)

    def choice(self, shares: np.ndarray) -> np.ndarray:
        """Positions in `shares`, which sum to 1 and are their probabilities, (B,)."""
        return np.searchsorted(np.cumsum(shares)[:-1], self.block(1)[:, 0], side="right")


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def smooth_fields(control: np.ndarray, size: int) -> Tensor:
    """Control points (B, C, n, n) to smooth fields (B, C, size, size)."""
    return F.interpolate(torch.from_numpy(control).float(), size=(size, size), mode="bicubic", align_corners=True)


def column(values: np.ndarray) -> Tensor:
    """One number an image, (B,), as a tensor (B, 1, 1)."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[:, None, None]


def signed_distance(inside: np.ndarray, reduce: int) -> np.ndarray:
    """Distances to the outline of a drawing (H, W) of booleans, positive inside, at 1 / `reduce` of its resolution.

    They are in pixels of the result, (H / reduce, W / reduce).
    """
    from scipy.ndimage import distance_transform_edt  # scipy comes with scikit-learn; slow to import

    signed = distance_transform_edt(inside) - distance_transform_edt(~inside)
    height, width = (side // reduce for side in inside.shape)
    distance: np.ndarray = signed.reshape(height, reduce, width, reduce).mean((1, 3)) / reduce
    return distance


def load_font(file: str | None, size: float) -> ImageFont.FreeTypeFont:
    """A font that ships inside matplotlib, by the name of its file; None: Pillow's default font."""
    if file is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", file), size)
