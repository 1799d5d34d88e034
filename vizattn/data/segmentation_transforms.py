"""Transforms of an image together with its mask; the augmentation is albumentations'."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vizattn.data.masks import IGNORE_INDEX
from vizattn.data.transforms import check_preprocessing
from vizattn.errors import VizattnError, unknown

__all__ = ["AUGMENTATIONS", "SegmentationTransform", "build_segmentation_transforms"]

AUGMENTATIONS = ("none", "light", "standard")
_SCALES = {"none": (1.0, 1.0), "light": (0.75, 1.33), "standard": (0.5, 2.0)}
_MOST_OF_ONE = 0.75  # share of a crop that one class may fill
_TRIES = 10


class SegmentationTransform:
    """From an image (PIL RGB) and its mask (uint8 (H, W)) to a normalised float32 tensor (3, h, w) and int64 labels.

    For evaluation only the image is resized; labels (H, W) stay as they are. For training both are scaled, cropped and
    padded to one size. Randomness comes from torch's default generator.

    See `build_segmentation_transforms` for the arguments.

    Attributes:
        deterministic: Whether it always gives the same for the same image and mask.
        identity: Hash of all that the transform is, equal in any process.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Any],
        train: bool,
        augment: str,
        crop_size: tuple[int, int] | None,
        short_side: int | None,
    ) -> None:
        self.preprocessing = dict(preprocessing)
        self.augment = augment
        self.crop_size = crop_size
        self.short_side = short_side
        self.deterministic = not train or (augment == "none" and crop_size is None and short_side is None)
        used = None if self.deterministic else (augment, crop_size)
        described = (sorted(self.preprocessing.items()), short_side, used)
        self.identity = hashlib.sha256(repr(described).encode()).hexdigest()
        self._mean = torch.tensor(self.preprocessing["mean"], dtype=torch.float32).mul_(255).view(3, 1, 1)
        self._std = torch.tensor(self.preprocessing["std"], dtype=torch.float32).mul_(255).view(3, 1, 1)
        self._resample = Image.Resampling[self.preprocessing["interpolation"].upper()]
        self._steps: Any = None

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        if self.deterministic:
            return self.prepare(image), torch.from_numpy(mask.astype(np.int64))
        if self._steps is None:
            self._steps = _augmentation(self.augment, self.crop_size, self.short_side, self._resample)
        # One generator for all steps: albumentations' own seeding gives each step the same numbers.
        seed = int(torch.randint(2**62, ()))
        self._steps.set_random_state(np.random.default_rng(seed), random.Random(seed))
        done = self._steps(image=np.asarray(image), mask=mask)
        tensor, labels = self._normalised(done["image"]), torch.from_numpy(done["mask"].astype(np.int64))
        height, width = self.crop_size or _scaled(image.size[::-1], self._scale(image))
        missing = (0, width - tensor.shape[-1], 0, height - tensor.shape[-2])
        if not any(missing):  # padding copies in any case
            return tensor, labels
        return F.pad(tensor, missing), F.pad(labels, missing, value=IGNORE_INDEX)  # 0 is the mean colour

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as evaluation and prediction see it, (3, h, w): its short side resized, where that is asked for."""
        if self.short_side is not None:
            image = image.resize(_scaled(image.size, self._scale(image)), self._resample)
        return self._normalised(np.asarray(image))

    def _scale(self, image: Image.Image) -> float:
        return 1.0 if self.short_side is None else self.short_side / min(image.size)

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
        return tensor.sub_(self._mean).div_(self._std)

    def __getstate__(self) -> dict[str, Any]:  # worker processes build their own steps
        return {**self.__dict__, "_steps": None}


def build_segmentation_transforms(
    preprocessing: Mapping[str, Any],
    *,
    train: bool,
    augment: str = "none",
    crop_size: tuple[int, int] | None = None,
    short_side: int | None = None,
) -> SegmentationTransform:
    """The transform from (image, mask) to a pair of tensors.

    Args:
        preprocessing: As `preprocessing_of` returns it; mean, std and interpolation are used.
        train: Crop, and augment; an evaluation transform ignores `augment` and `crop_size`.
        augment: "none" (only a random crop, if `crop_size` is given), "light" (scale 0.75 to 1.33 and changes of light;
            no flip) or "standard" (customary on ADE20K, Pascal VOC and Cityscapes: scale 0.5 to 2, a crop of which no
            class fills more than three quarters if ten tries find one, horizontal flip, changes of light and colour).
        crop_size: Height and width of what training sees, by default those of the image, which must then be the same
            for all of a batch. Smaller images are padded at the right and at the bottom, with the mean colour and with
            labels 255.
        short_side: Pixels to which the short side of an image is resized before all else; by default it stays.

    Raises:
        VizattnError: Unknown augmentation or preprocessing key, or a value that makes no sense.
    """
    settings = check_preprocessing(preprocessing)
    if augment not in AUGMENTATIONS:
        raise unknown("augmentation", augment, AUGMENTATIONS)
    if short_side is not None and short_side < 1:
        raise VizattnError(f"short_side must be at least 1 pixel, not {short_side}.")
    used = {key: settings[key] for key in ("mean", "std", "interpolation")}
    if crop_size is not None and (len(crop_size) != 2 or min(crop_size) < 1):
        raise VizattnError(f"crop_size must be [height, width] in pixels, not {crop_size}.")
    return SegmentationTransform(used, train, augment, crop_size, short_side)


def _augmentation(
    augment: str, crop_size: tuple[int, int] | None, short_side: int | None, resample: Image.Resampling
) -> Any:
    """The steps of training as one `albumentations.Compose`."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it asks PyPI for a newer release
    import albumentations as A

    class ScaledCrop(A.DualTransform):
        """A window of the scaled image; only what the window shows is resampled."""

        def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
            height, width = native = data["image"].shape[:2]
            scale = 1.0 if short_side is None else short_side / min(native)
            limit = crop_size or _scaled(native, scale)
            scaled = _scaled(native, scale * self.py_random.uniform(*_SCALES[augment]))
            size = min(scaled[0], limit[0]), min(scaled[1], limit[1])
            for _ in range(_TRIES if augment == "standard" else 1):
                top = self.py_random.randint(0, scaled[0] - size[0])
                left = self.py_random.randint(0, scaled[1] - size[1])
                rows = _sources(top, size[0], scaled[0], height)
                columns = _sources(left, size[1], scaled[1], width)
                labels = data["mask"][rows[:, None], columns]
                if augment != "standard" or _varied(labels):
                    break
            ratio_y, ratio_x = height / scaled[0], width / scaled[1]
            box = left * ratio_x, top * ratio_y, (left + size[1]) * ratio_x, (top + size[0]) * ratio_y
            box = box[0], box[1], min(box[2], width), min(box[3], height)  # rounding
            return {"box": box, "size": size, "labels": labels}

        def apply(self, img: np.ndarray, box: Any, size: tuple[int, int], **params: Any) -> np.ndarray:
            return np.asarray(Image.fromarray(img).resize(size[::-1], resample, box=box))

        def apply_to_mask(self, mask: np.ndarray, labels: np.ndarray, **params: Any) -> np.ndarray:
            return labels

    steps: list[Any] = [ScaledCrop(p=1.0)]
    if augment == "light":
        steps.append(A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=1.0))
    if augment == "standard":
        same = (1.0, 1.0)
        colour = {"brightness": same, "contrast": same, "saturation": same, "hue": (0.0, 0.0), "p": 0.5}
        steps += [
            A.HorizontalFlip(p=0.5),
            A.RandomBrightnessContrast(brightness_limit=32 / 255, contrast_limit=(0.0, 0.0), p=0.5),
            A.RandomBrightnessContrast(brightness_limit=(0.0, 0.0), contrast_limit=0.5, p=0.5),
            A.ColorJitter(**{**colour, "saturation": (0.5, 1.5)}),
            A.ColorJitter(**{**colour, "hue": (-0.05, 0.05)}),  # 18 degrees
        ]
    return A.Compose(steps)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _sources(start: int, count: int, scaled: int, native: int) -> np.ndarray:
    """Nearest native row of `count` rows from `start` on of an image of `scaled` rows, by pixel centres."""
    return ((np.arange(start, start + count) + 0.5) * (native / scaled)).astype(np.int64).clip(max=native - 1)


def _varied(labels: np.ndarray) -> bool:
    """Whether there are two classes or more, none of which fills more than its share of the labelled pixels."""
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < _MOST_OF_ONE * counts.sum())
