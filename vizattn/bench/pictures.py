"""Folders of pictures to load: noise of all scales, which costs a decoder about what a photograph does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["pairs", "pictures"]


def pictures(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Two class folders with `count` JPEG files of `size` (height, width) in all; written at the first call."""
    target = folder / f"pictures-{size[0]}x{size[1]}-{count}"
    if not target.is_dir():
        unfinished = target.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        for i in range(count):
            place = unfinished / "train" / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_noise(size, 3, i)).save(place / f"{i}.jpg", quality=90)
        os.replace(unfinished, target)
    return target


def pairs(folder: Path, size: tuple[int, int], count: int) -> Path:
    """`images/train` of JPEG files and `masks/train` of PNG files with eight classes in patches."""
    target = folder / f"pairs-{size[0]}x{size[1]}-{count}"
    if not target.is_dir():
        unfinished = target.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        for kind in ("images", "masks"):
            (unfinished / kind / "train").mkdir(parents=True)
        for i in range(count):
            labels = _noise(size, 1, i, smooth=True)[..., 0] // 32
            Image.fromarray(_noise(size, 3, i)).save(unfinished / "images" / "train" / f"{i}.jpg", quality=90)
            Image.fromarray(labels).save(unfinished / "masks" / "train" / f"{i}.png")
        os.replace(unfinished, target)
    return target


def _noise(size: tuple[int, int], channels: int, seed: int, smooth: bool = False) -> np.ndarray:
    """(height, width, channels) uint8: each octave has half the amplitude of the one below."""
    generator = np.random.default_rng(seed)
    total = np.zeros((*size, channels), np.float32)
    for octave in range(2 if smooth else 8):
        cells = min(4 * 2**octave, *size)
        for channel in range(channels):
            coarse = Image.fromarray(generator.standard_normal((cells, cells)).astype(np.float32))
            fine = coarse.resize(size[::-1], Image.Resampling.BICUBIC)
            total[..., channel] += 0.5**octave * np.asarray(fine)
    return (128 + 50 * total).clip(0, 255).astype(np.uint8)
