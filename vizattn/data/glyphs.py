"""Letters A-Z and a-z drawn on the fly, in fonts that ship inside matplotlib and Pillow; no digits.

Each letter of each font is rendered once into an atlas of signed distances (Frisken et al., "Adaptively sampled
distance fields", SIGGRAPH 2000), so that one batched look-up applies the affine map and the elastic warp while a
threshold on the distance sets the stroke width, constant or uneven along the stroke.
"""

from __future__ import annotations

import functools
import hashlib
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from vizattn.data.drawing import Hashed, column, load_font, signed_distance, smooth_fields
from vizattn.data.transforms import is_deterministic
from vizattn.errors import VizattnError

__all__ = ["CLASS_NAMES", "FACES", "IMAGE_SIZE", "LENGTHS", "Face", "Glyphs", "draw", "draw_letters", "render_letters"]

CLASS_NAMES = list(string.ascii_uppercase + string.ascii_lowercase)
IMAGE_SIZE = 32
LENGTHS = {"train": 52_000, "val": 2_600, "test": 5_200}
_RULE = 1  # raise it when a change below changes the images


class Face(NamedTuple):
    """One alphabet: a font file of matplotlib's (None: Pillow's default font) and the code points of its A and a."""

    name: str
    file: str | None
    upper: int = ord("A")
    lower: int = ord("a")


def _plain(*files: str) -> list[Face]:
    return [Face(file, f"{file}.ttf") for file in files]


# The test faces are held out as whole designs: the STIX serif family, and Pillow's default (Aileron). STIXGeneral.ttf
# also holds a sans and a typewriter design at mathematical code points: unlike its serif, and trained on.
_TRAIN_FACES = [
    *_plain("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *_plain("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *_plain("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *_plain("cmr10", "cmb10", "cmti10", "cmmi10", "cmss10", "cmtt10"),
    Face("STIX sans", "STIXGeneral.ttf", 0x1D5A0, 0x1D5BA),
    Face("STIX sans bold", "STIXGeneral.ttf", 0x1D5D4, 0x1D5EE),
    Face("STIX sans italic", "STIXGeneral.ttf", 0x1D608, 0x1D622),
    Face("STIX sans bold italic", "STIXGeneral.ttf", 0x1D63C, 0x1D656),
    Face("STIX typewriter", "STIXGeneral.ttf", 0x1D670, 0x1D68A),
]
_TEST_FACES = [
    *_plain("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    Face("Pillow default", None),
]
FACES: dict[str, list[Face]] = {"train": _TRAIN_FACES, "val": _TRAIN_FACES, "test": _TEST_FACES}

_TILE = 64  # side of an atlas tile in pixels
_CAP = 38  # height of a capital H in a tile
_SUPER = 2  # letters are rendered this much larger, for smooth distances
_RESOLUTIONS = np.array([32, 24, 16, 12, 10, 8])  # of the simulated scan
_RESOLUTION_SHARES = np.array([0.30, 0.10, 0.15, 0.10, 0.10, 0.25])


class Glyphs(Dataset):
    """Drawn letters: a function of (seed, split, index), and of the epoch in the training split.

    Labels are `index % 52`; the letters and faces take equal shares. `train` draws new images after each `set_epoch`;
    `val` (the same faces, other images) and `test` (held-out faces) never change.

    Args:
        split: "train", "val" or "test".
        transform: Gets a uint8 tensor (3, 32, 32): drawing whole batches as tensors is several times faster than by
            PIL. Without a transform an item is a PIL RGB image. A deterministic transform is applied to whole batches.
        length: Number of images; `LENGTHS[split]` by default.
        seed: Of everything random.
    """

    def __init__(
        self, split: str, transform: Callable[[Any], Any] | None = None, length: int | None = None, seed: int = 0
    ) -> None:
        self.split = split
        self.class_names = list(CLASS_NAMES)
        self.transform = transform
        if length is not None and length < 1:
            raise VizattnError(f"The length of glyphs must be at least 1, not {length}.")
        self.length = length or LENGTHS[split]
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    @property
    def labels(self) -> list[int]:
        """The class of each item, in order."""
        return [index % len(CLASS_NAMES) for index in range(self.length)]

    @property
    def identity(self) -> str:
        """Hash of which images come in which order: the rule, its arguments and the versions of the font renderers."""
        import matplotlib
        import PIL

        parts = (
            "glyphs",
            _RULE,
            self.split,
            self.length,
            self.seed,
            self.epoch,
            matplotlib.__version__,
            PIL.__version__,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Turns the training split to the images of `epoch`; no effect on the others."""
        if self.split == "train":
            self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.__getitems__([range(self.length)[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        images = draw(self.split, indices, seed=self.seed, epoch=self.epoch)
        labels = [index % len(CLASS_NAMES) for index in indices]
        if self.transform is None:
            return [(Image.fromarray(image.permute(1, 2, 0).numpy()), y) for image, y in zip(images, labels)]
        if is_deterministic(self.transform):
            return list(zip(self.transform(images), labels))
        return [(self.transform(image), y) for image, y in zip(images, labels)]


def draw(split: str, indices: Sequence[int], seed: int = 0, epoch: int = 0) -> Tensor:
    """Images of the given indices, uint8 (B, 3, 32, 32); each depends on its own index alone."""
    index = np.asarray(indices, dtype=np.int64)
    faces = len(FACES[split])
    tile = (index // len(CLASS_NAMES) % faces) * len(CLASS_NAMES) + index % len(CLASS_NAMES)
    return draw_letters(_atlas(split)[tile], Hashed(f"{_RULE}/{split}/{seed}/{epoch}", index))


def draw_letters(tiles: np.ndarray, rng: Hashed) -> Tensor:
    """Images uint8 (B, 3, 32, 32) of letters, each distorted, inked and scanned at random.

    Args:
        tiles: Of an atlas, uint8 (B, 64, 64), see `render_letters`.
        rng: One index an image.
    """
    uniform, chance, sign = rng.uniform, rng.chance, rng.sign
    distance = torch.from_numpy(tiles).float().sub_(128).div_(8 * _CAP)[:, None]  # in cap heights

    # Placement: from the frame to the letter, all in the units of grid_sample (a side is 2).
    # Each image has its own strength of distortion: the plain ones are what a fresh network learns from first.
    strength = uniform(0.0, 1.0)
    height = 0.92 + strength * uniform(-0.2, 0.1)
    width = height * (1 + strength * uniform(-0.3, 0.3))
    angle = strength * uniform(-0.3, 0.3)
    slant = strength * uniform(-0.55, 0.45)
    shift_x, shift_y = strength * uniform(-0.15, 0.15), strength * uniform(-0.12, 0.12)
    bend = 0.08 * strength * uniform(0.0, 1.0)
    uneven = 0.03 * strength * uniform(0.0, 1.0)
    fields = smooth_fields(rng.normal(4 * 5 * 5).reshape(-1, 4, 5, 5), IMAGE_SIZE)  # dx, dy, stroke, paper
    axis = (torch.arange(IMAGE_SIZE) + 0.5) * (2 / IMAGE_SIZE) - 1
    x, y = axis - column(shift_x), axis[:, None] - column(shift_y)
    cos, sin = column(np.cos(angle)), column(np.sin(angle))
    x, y = cos * x + sin * y, cos * y - sin * x
    x = (x + column(slant) * y) * column(_CAP / _TILE / width) + column(bend) * fields[:, 0]
    y = y * column(_CAP / _TILE / height) + column(bend) * fields[:, 1]
    distance = F.grid_sample(distance, torch.stack([x, y], -1), padding_mode="border", align_corners=False)[:, 0]

    # Ink: the threshold is the stroke's growth; its slope, in pixels, is the softness of the edge.
    growth = column(uniform(-0.018, 0.06)) + column(uneven) * fields[:, 2]
    softness = np.where(chance(0.3), uniform(1.0, 3.0), 1.0)
    ink = ((distance + growth) * column(IMAGE_SIZE * height / softness) + 0.5).clamp_(0, 1)

    # Paper and pen; "clean" is light on black at full contrast, as many scans are.
    clean = chance(0.6)
    contrast = np.where(clean, 1.0, uniform(0.3, 1.0))
    dark = np.where(clean, 0.0, uniform(0.0, 1.0) * (1 - contrast))
    negative = np.where(clean, chance(0.1), chance(0.5))
    paper, pen = np.where(negative, dark + contrast, dark), np.where(negative, dark, dark + contrast)
    coloured = 0.5 * chance(0.3) * ~clean
    tint = rng.block(6).reshape(-1, 2, 3) - 0.5
    tint = (coloured * uniform(0.2, 1.0) * contrast)[:, None, None] * tint
    gradient_x, gradient_y = uniform(-1.0, 1.0), uniform(-1.0, 1.0)
    slope = 0.25 * contrast * chance(0.3) * ~clean
    texture = 0.12 * contrast * chance(0.3) * ~clean
    ground = column(slope * gradient_x) * axis + column(slope * gradient_y) * axis[:, None]
    ground = ground + column(texture) * fields[:, 3]
    paper_rgb = torch.from_numpy(paper[:, None] + tint[:, 0]).float()[..., None, None] + ground[:, None]
    pen_rgb = torch.from_numpy(pen[:, None] + tint[:, 1]).float()[..., None, None]
    image = torch.lerp(paper_rgb, pen_rgb.expand_as(paper_rgb), ink[:, None])

    noise = torch.from_numpy(rng.normal(IMAGE_SIZE**2)).float().view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    noise *= column(np.where(chance(0.45), uniform(0.0, 0.1) * sign() * contrast, 0.0))[:, None]
    image = _scan(image, noise, rng.choice(_RESOLUTION_SHARES), rng.choice(np.array([0.65, 0.25, 0.1])))
    return image.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _scan(image: Tensor, noise: Tensor, resolution: np.ndarray, enlarge: np.ndarray) -> Tensor:
    """Reduces each image to its resolution by areas, adds the noise there, and enlarges it again in its own way."""
    out = torch.empty_like(image)
    for i, side in enumerate(_RESOLUTIONS.tolist()):
        for j, mode in enumerate(("bicubic", "bilinear", "nearest")):
            chosen = torch.from_numpy(np.flatnonzero((resolution == i) & (enlarge == j)))
            if not len(chosen):
                continue
            small = image[chosen]
            if side != IMAGE_SIZE:
                small = F.interpolate(small, size=(side, side), mode="area")
            small = (small + noise[chosen, :, :side, :side]).clamp_(0, 1)
            if side != IMAGE_SIZE:
                options = {} if mode == "nearest" else {"align_corners": False, "antialias": True}
                small = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode=mode, **options)  # type: ignore[arg-type]
            out[chosen] = small
    return out


@functools.cache
def _atlas(split: str) -> np.ndarray:
    """Tiles of the split's faces, uint8 (faces * 52, 64, 64)."""
    if split == "val":
        return _atlas("train")
    faces = FACES[split]
    return np.concatenate([render_letters(face, [*_alphabet(face.upper), *_alphabet(face.lower)]) for face in faces])


def _alphabet(start: int) -> list[str]:
    return [chr(start + place) for place in range(26)]


def render_letters(face: Face, letters: Sequence[str]) -> np.ndarray:
    """Signed distances to each letter's outline, uint8 (letters, 64, 64): 128 on it, 8 a pixel, more inside."""
    side = _TILE * _SUPER
    font = load_font(face.file, 100)
    left, top, right, bottom = font.getbbox(chr(face.upper + 7))
    font = load_font(face.file, 100 * _CAP * _SUPER / (bottom - top))
    tiles = []
    for letter in letters:
        left, top, right, bottom = font.getbbox(letter)
        canvas = Image.new("L", (side, side))
        corner = ((side - left - right) / 2, (side - top - bottom) / 2)
        ImageDraw.Draw(canvas).text(corner, letter, fill=255, font=font)
        tiles.append(signed_distance(np.asarray(canvas) > 127, _SUPER))
    return np.clip(np.stack(tiles) * 8 + 128, 0, 255).astype(np.uint8)
