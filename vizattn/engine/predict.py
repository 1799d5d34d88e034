"""What a trained model says of single images, for the command line and the server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vizattn.data import build_transforms
from vizattn.data.images import load_rgb
from vizattn.data.masks import voc_palette
from vizattn.engine.config import resolve_config
from vizattn.engine.evaluate import Trained
from vizattn.engine.kinds import kind_of
from vizattn.engine.pictures import Palette, segment
from vizattn.errors import VizattnError
from vizattn.heads import Segmenter

__all__ = ["FIRST_OF_SEVERAL", "Predictor", "memory_errors", "read_image"]

#: What is said of animations and of files of several pages.
FIRST_OF_SEVERAL = "only the first of several frames"
#: A side this many times the other is no picture; resized by the short side it would fill the memory.
LONGEST = 100


def read_image(source: str | os.PathLike[str] | BinaryIO, **limits: Any) -> Image.Image:
    """An image file as RGB, or one line why not.

    Args:
        source: A path, or an open file.
        limits: Of `load_rgb`.

    Raises:
        VizattnError: The reason, without the name of the file.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.exists() and not path.is_file():  # reading a pipe would wait
            raise VizattnError("a folder, not a file" if path.is_dir() else "not a regular file")
    try:
        image = load_rgb(source, **limits)
    except OSError as error:
        raise VizattnError(_reason(error, source)) from error
    if max(image.size) > LONGEST * min(image.size):
        raise VizattnError(f"{image.width} x {image.height} pixels: a side is over {LONGEST} times the other")
    return image


def _reason(error: OSError, source: Any) -> str:
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return f"{re.findall('[0-9]+ pixels', str(error))[0]} are too many to decode"
    if not isinstance(error, UnidentifiedImageError):
        return error.strerror or str(error) or type(error).__name__
    size = source.seek(0, os.SEEK_END) if hasattr(source, "seek") else os.path.getsize(source)
    return "not an image file" if size else "the file is empty"


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch raises of memory that cannot be had into `MemoryError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError("there is not enough memory for it") from error
        raise


class Predictor:
    """Classifies images, or segments them.

    Args:
        trained: What `load_trained` gives; its model stays where it is, in evaluation mode.

    Attributes:
        segments: Whether the model is a segmenter.
        palette: Colours of the classes.

    Raises:
        VizattnError: A segmenter came without its recipe, or with a damaged one.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.class_names = trained.class_names
        self.palette: Palette = trained.palette or voc_palette(len(trained.class_names))
        self.segments = isinstance(trained.model, Segmenter)
        if not self.segments:
            self.transform = build_transforms(trained.preprocessing, train=False)
            return
        if trained.config is None:
            raise VizattnError(
                "The segmenter came without the recipe it was trained by, which says how images are cut."
            )
        config = resolve_config(trained.config)
        kind = kind_of(config)
        self.task = kind.build_task(trained.model, config, len(trained.class_names), "images").eval()
        self.transform = kind.build_transform(trained.preprocessing, config["data"], False)

    def classify(self, inputs: Sequence[Tensor], top_k: int) -> list[list[dict[str, Any]]]:
        """Of each image, (3, H, W) as `transform` gives it: `class` and `probability` of the likeliest, best first."""
        device = next(self.trained.model.parameters()).device
        with torch.inference_mode(), memory_errors():
            logits = self.trained.model(torch.stack(list(inputs)).to(device)).float()
        if logits.shape != (len(inputs), len(self.class_names)):
            raise VizattnError(
                f"The model gives {tuple(logits.shape)} numbers of {len(inputs)} images, and not one for each of its "
                f"{len(self.class_names)} classes: its pooling or its head is not that of a classifier."
            )
        probabilities = logits.softmax(-1).cpu()
        return [self._best(row, top_k, "probability") for row in probabilities]

    def segment(self, image: Image.Image, top_k: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Class numbers (H, W) of an image; `class` and `share` of the pixels, of those there are, largest first."""
        with memory_errors():
            mask = segment(self.task, self.transform, image)
        counts = np.bincount(mask.ravel(), minlength=len(self.class_names))
        shares = self._best(torch.from_numpy(counts / mask.size), top_k, "share")
        return mask, [best for best in shares if best["share"]]

    def _best(self, values: Tensor, top_k: int, measure: str) -> list[dict[str, Any]]:
        order = values.argsort(descending=True, stable=True)[:top_k].tolist()
        return [{"class": self.class_names[c], measure: round(float(values[c]), 6)} for c in order]
