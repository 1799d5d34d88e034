"""Drawn scenes with exact masks: seven kinds of objects over textured grounds, for segmentation without any download.

Each kind is drawn once into an atlas of signed distances; one batched look-up places, turns and stretches the objects,
which then cover one another. Colour, texture, size and angle are independent of the class: only the shape tells it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from vizattn.data.drawing import Hashed, column, load_font, signed_distance, smooth_fields
from vizattn.errors import VizattnError

__all__ = ["CLASS_NAMES", "IMAGE_SIZE", "LENGTHS", "PALETTE", "Scenes", "draw_scenes"]

CLASS_NAMES = ["background", "disk", "ring", "triangle", "square", "star", "cross", "letter"]
PALETTE = [(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)]
PALETTE += [(70, 240, 240)]
IMAGE_SIZE = 64
LENGTHS = {"train": 8_000, "val": 500, "test": 1_000}
_RULE = 1  # raise it when a change below changes the images

_MOST = 4  # objects in a scene
_TILE = 64  # side of an atlas tile in pixels
_REACH = 26  # of a shape in its tile, from the middle to the farthest corner
_SUPER = 4  # shapes are drawn this much larger, for smooth distances
_SHAPES = len(CLASS_NAMES) - 2
_LETTERS = "ABEFGHKMNPRSWYZ"  # none that is a ring, a cross or a bar
# The test split has letters of other designs.
_FONTS = {
    "train": ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneralBol.ttf", "cmb10.ttf"),
    "test": ("DejaVuSansMono-Bold.ttf", None),
}
_TEXTURES = 5  # plain, stripes, checks, clouds, grain


class Scenes(Dataset):
    """Drawn scenes, 64 x 64 pixels: a function of (seed, split, index), and of the epoch in the training split.

    An item is an image (PIL RGB) and its mask (uint8 (64, 64), positions in `class_names`), through `transform`.
    `train` draws new scenes after each `set_epoch`; `val` and `test` (with letters of other fonts) never change.

    Args:
        split: "train", "val" or "test".
        transform: Gets image and mask.
        length: Number of scenes; `LENGTHS[split]` by default.
        seed: Of everything random.

    Raises:
        VizattnError: The length is not positive.
    """

    ignore_index = 255

    def __init__(
        self,
        split: str,
        transform: Callable[[Any, np.ndarray], Any] | None = None,
        *,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if length is not None and length < 1:
            raise VizattnError(f"The length of scenes must be at least 1, not {length}.")
        self.split = split
        self.class_names = list(CLASS_NAMES)
        self.palette = list(PALETTE)
        self.transform = transform
        self.length = length or LENGTHS[split]
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    @property
    def identity(self) -> str:
        """Hash of which scenes come in which order: the rule, its arguments and the versions of the font renderers."""
        import matplotlib
        import PIL

        versions = (matplotlib.__version__, PIL.__version__)
        parts = ("scenes", _RULE, self.split, self.length, self.seed, self.epoch, *versions)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Turns the training split to the scenes of `epoch`; no effect on the others."""
        if self.split == "train":
            self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.__getitems__([range(self.length)[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        images, masks = draw_scenes(self.split, indices, seed=self.seed, epoch=self.epoch)
        pairs = [(Image.fromarray(image), mask) for image, mask in zip(images, masks)]
        return pairs if self.transform is None else [self.transform(image, mask) for image, mask in pairs]


def draw_scenes(split: str, indices: Sequence[int], seed: int = 0, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (B, 64, 64, 3) and masks uint8 (B, 64, 64); each scene depends on its own index alone."""
    index = np.asarray(indices, dtype=np.int64)
    rng = Hashed(f"scenes/{_RULE}/{split}/{seed}/{epoch}", index)
    x, y = _axes()
    count = 1 + rng.choice(np.full(_MOST, 1 / _MOST))
    quarters = np.argsort(rng.block(4), axis=1)  # objects begin in quarters of their own, and stray

    # 0 is the ground; then the objects from back to front.
    layer = torch.zeros(len(index), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64)
    classes = np.zeros((len(index), _MOST + 1), dtype=np.uint8)
    for place in range(_MOST):
        shape = rng.choice(np.full(_SHAPES + 1, 1 / (_SHAPES + 1)))
        classes[:, place + 1] = shape + 1
        outlines = torch.from_numpy(_outlines(split)[_tile_of(shape, rng.block(1)[:, 0], split)])
        radius = rng.uniform(9.0, 22.0) / (IMAGE_SIZE / 2)
        stretch, angle = rng.uniform(0.85, 1.18), rng.uniform(0.0, 2 * math.pi)
        centre_x = quarters[:, place] % 2 - 0.5 + rng.uniform(-0.35, 0.35)
        centre_y = quarters[:, place] // 2 - 0.5 + rng.uniform(-0.35, 0.35)
        dx, dy = x - column(centre_x), y - column(centre_y)
        zoom, cos, sin = _REACH / (_TILE / 2) / radius, np.cos(angle), np.sin(angle)
        u = column(zoom * cos * stretch) * dx + column(zoom * sin * stretch) * dy
        v = column(zoom * cos / stretch) * dy - column(zoom * sin / stretch) * dx
        distance = F.grid_sample(outlines, torch.stack([u, v], -1), padding_mode="border", align_corners=False)[:, 0]
        layer[(distance > 0) & (column(count) > place)] = place + 1

    image = _paint(rng, layer, x, y)
    masks = np.take_along_axis(classes, layer.flatten(1).numpy(), axis=1).reshape(layer.shape)
    return image.clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(), masks


def _paint(rng: Hashed, layer: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Colours and textures of the layers, then light, blur and noise over all: (B, 3, 64, 64)."""
    ground = rng.uniform(0.0, 1.0)
    layers = []
    for place in range(_MOST + 1):
        # An object differs in tone from the ground on the average; its texture may reach the ground's tone.
        tone = ground if place == 0 else (ground + rng.uniform(0.3, 0.7)) % 1
        texture = 1 + rng.choice(np.full(4, 0.25)) if place == 0 else rng.choice(np.full(_TEXTURES, 1 / _TEXTURES))
        first = tone[:, None] + _tint(rng)
        second = first + (rng.uniform(0.1, 0.3) * rng.sign())[:, None] + 0.5 * _tint(rng)
        angle, frequency = rng.uniform(0.0, math.pi), 2 * math.pi * (IMAGE_SIZE / 2) / rng.uniform(5.0, 16.0)
        waves = np.stack([np.cos(angle) * frequency, np.sin(angle) * frequency, rng.uniform(0.0, 2 * math.pi)], 1)
        layers.append(np.concatenate([first, second - first, waves, np.eye(_TEXTURES)[texture][:, 1:]], axis=1))
    table = torch.from_numpy(np.stack(layers, 1)).float()  # (B, layers, values)

    batch, size = len(layer), (IMAGE_SIZE, IMAGE_SIZE)
    rows = (layer + (torch.arange(batch) * (_MOST + 1)).view(-1, 1, 1)).flatten()
    values = table.flatten(0, 1).T.contiguous().index_select(1, rows).view(-1, batch, *size)  # of each pixel's layer
    first, change, (cos, sin, phase), kinds = values[:3], values[3:6], values[6:9], values[9:]
    along, across = torch.sin(cos * x + sin * y + phase), torch.sin(cos * y - sin * x + phase)
    clouds = smooth_fields(rng.normal(6 * 6).reshape(-1, 1, 6, 6), IMAGE_SIZE)[:, 0]
    grain = smooth_fields(rng.normal(24 * 24).reshape(-1, 1, 24, 24), IMAGE_SIZE)[:, 0]
    pattern = kinds[0] * (3 * along) + kinds[1] * (4 * along * across) + kinds[2] * clouds + kinds[3] * grain
    image = (first + change * pattern.clamp_(-1, 1).add_(1).div_(2)).movedim(0, 1)

    slope_x, slope_y = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    image = image * (1 + column(slope_x) * x + column(slope_y) * y)[:, None]
    blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    image = torch.lerp(image, blurred, column(rng.uniform(0.2, 0.9))[:, None])
    noise = torch.from_numpy(rng.normal(IMAGE_SIZE**2).astype(np.float32)).view(batch, 1, *size)
    return image + column(rng.uniform(0.0, 0.06))[:, None] * noise


def _tint(rng: Hashed) -> np.ndarray:
    """A change of colour that keeps the tone, (B, 3)."""
    tint = rng.block(3) * 0.6 - 0.3
    centred: np.ndarray = tint - tint.mean(1, keepdims=True)
    return centred


def _axes() -> tuple[Tensor, Tensor]:
    axis = (torch.arange(IMAGE_SIZE) + 0.5) * (2 / IMAGE_SIZE) - 1
    return axis, axis[:, None]


def _tile_of(shape: np.ndarray, chance: np.ndarray, split: str) -> np.ndarray:
    """Position in the atlas; `chance` in [0, 1) chooses the letter."""
    letters = len(_outlines(split)) - _SHAPES
    return np.where(shape < _SHAPES, shape, _SHAPES + (chance * letters).astype(np.int64))


def _outlines(split: str) -> np.ndarray:
    return _render("test" if split == "test" else "train")


@functools.cache
def _render(split: str) -> np.ndarray:
    """Signed distances to the outlines of the shapes, then of the letters, positive inside: float32 (N, 1, 64, 64)."""
    canvases = [_polygons([_corners(90)])]  # a disk
    inner = _polygons([0.55 * _corners(90)])
    canvases.append(canvases[0] & ~inner)
    canvases.append(_polygons([_corners(3)]))
    canvases.append(_polygons([_corners(4) @ np.array([(1, 1), (-1, 1)]) / 2**0.5]))
    star = _corners(10)
    star[1::2] *= 0.42
    canvases.append(_polygons([star]))
    long, short = 0.95, 0.3
    bar = np.array([(-long, -short), (long, -short), (long, short), (-long, short)])
    canvases.append(_polygons([bar, bar[:, ::-1]]))
    canvases += [_letter(file, letter) for file in _FONTS[split] for letter in _LETTERS]
    return np.stack([signed_distance(canvas, _SUPER) for canvas in canvases]).astype(np.float32)[:, None]


def _corners(n: int) -> np.ndarray:
    """Of a regular polygon in the unit circle, (n, 2)."""
    angles = 2 * math.pi * np.arange(n) / n
    return np.stack([np.sin(angles), -np.cos(angles)], 1)


def _polygons(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """A tile with polygons filled, whose unit is the reach of a shape."""
    canvas = Image.new("L", (_TILE * _SUPER, _TILE * _SUPER))
    for polygon in polygons:
        pixels = (polygon * _REACH + _TILE / 2) * _SUPER
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in pixels], fill=255)
    return np.asarray(canvas) > 127


def _letter(file: str | None, letter: str) -> np.ndarray:
    """A tile with a letter, whose box reaches from the middle as far as a shape's corners would."""
    side = _TILE * _SUPER
    left, top, right, bottom = load_font(file, 100).getbbox(letter)
    font = load_font(file, 100 * 2 * _REACH * _SUPER / math.hypot(right - left, bottom - top))
    left, top, right, bottom = font.getbbox(letter)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - left - right) / 2, (side - top - bottom) / 2), letter, fill=255, font=font)
    return np.asarray(canvas) > 127
