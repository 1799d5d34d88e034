"""Masks as pictures: index PNGs that keep the class numbers, overlays for people, a legend, and sample logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from vizattn.files import replacing

__all__ = [
    "OverlayHook",
    "Palette",
    "caption",
    "index_image",
    "legend",
    "overlay",
    "plain_item",
    "save_image",
    "segment",
]

Palette = Sequence[Sequence[int]]


def index_image(mask: np.ndarray, palette: Palette) -> Image.Image:
    """A picture (H, W) whose pixel values are the class numbers of `mask` and whose palette shows them in colour.

    Beyond 256 classes there is no palette, and pixels have 16 bits.
    """
    if len(palette) > 256:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette([value for colour in palette for value in colour])
    return image


def overlay(image: Image.Image, mask: np.ndarray, palette: Palette, opacity: float = 0.5) -> Image.Image:
    """The picture with the classes of `mask` (H, W) painted over it, and dark lines where they meet.

    Pixels whose number is no class (ignored ones), and those of a black class (background), stay as they are.
    """
    colours = np.asarray(palette, dtype=np.uint8)[np.where(mask < len(palette), mask, 0)]
    painted = (mask < len(palette)) & colours.any(axis=-1)
    image = image.convert("RGB")
    blended = np.array(  # in bytes throughout: large photographs as floats would take more than the model
        Image.composite(Image.blend(image, Image.fromarray(colours), opacity), image, Image.fromarray(painted))
    )
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    blended[edge] //= 3
    return Image.fromarray(blended)


def plain_item(dataset: Any, index: int) -> tuple[Image.Image, np.ndarray]:
    """An image and its labels (H, W) as they are before the data set's transform."""
    transform, dataset.transform = dataset.transform, None
    try:
        return dataset[index]
    finally:
        dataset.transform = transform


def legend(class_names: Sequence[str], palette: Palette) -> Image.Image:
    """A picture with a line a class: colour, number, name."""
    font, height = ImageFont.load_default(size=14), 22
    lines = [f"{number}  {name}" for number, name in enumerate(class_names)]
    width = 40 + int(max(font.getlength(line) for line in lines))
    picture = Image.new("RGB", (width, height * len(lines) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for row, (line, colour) in enumerate(zip(lines, palette)):
        top = 4 + row * height
        draw.rectangle((6, top + 2, 26, top + 18), fill=tuple(colour), outline="black")
        draw.text((34, top + 2), line, fill="black", font=font)
    return picture


def caption(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The picture, small ones enlarged, with lines of text below it."""
    factor = max(1, 224 // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    font, height = ImageFont.load_default(size=14), 20
    width = max(picture.width, 12 + int(max(font.getlength(line) for line in lines)))
    sheet = Image.new("RGB", (width, picture.height + height * len(lines) + 8), "white")
    sheet.paste(picture)
    for row, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((6, picture.height + 4 + row * height), line, fill="black", font=font)
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Write the picture whole, in the format of the file's ending."""
    with replacing(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


@torch.inference_mode()
def segment(task: nn.Module, transform: Any, image: Image.Image) -> np.ndarray:
    """Class numbers (H, W) of an image, by a `SegmentationTask` in evaluation mode and its transform."""
    pixels = transform.prepare(image)[None].to(next(task.parameters()).device)
    size = torch.empty(1, image.height, image.width)
    (mask,) = task(pixels, size, mode="predict")
    return mask.cpu().numpy()


class OverlayHook(Hook):
    """Logs a few validation images with their labels and predictions, where wandb or tensorboard is on.

    Args:
        dataset: The validation images; its transform is that of evaluation.
        palette: Colours of the classes.
        count: How many images, spread evenly.
    """

    priority = "ABOVE_NORMAL"  # before averaged weights, which were measured, are taken out again

    def __init__(self, dataset: Any, palette: Palette, count: int = 4) -> None:
        self.dataset = dataset
        self.palette = palette
        self.places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        if runner.rank or not runner.visualizer._vis_backends:
            return
        runner.task.eval()
        for place in self.places.tolist():
            image, labels = plain_item(self.dataset, place)
            predicted = segment(runner.task, self.dataset.transform, image)
            shown = [image, self._paint(image, labels), self._paint(image, predicted)]
            runner.visualizer.add_image(f"val/{place}", np.concatenate([*map(np.asarray, shown)], 1), step=runner.iter)

    def _paint(self, image: Image.Image, mask: np.ndarray) -> Image.Image:
        return overlay(image, mask, self.palette)
