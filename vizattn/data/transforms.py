"""Image transforms: evaluation as timm means it, and three levels of training augmentation, by torchvision's v2."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio, str_to_interp_mode
from torch import nn
from torchvision.transforms import v2

from vizattn.errors import VizattnError, unknown

__all__ = [
    "AUGMENTATIONS",
    "build_transforms",
    "check_preprocessing",
    "is_deterministic",
    "preprocessing_of",
    "transform_identity",
]

AUGMENTATIONS = ("none", "light", "standard")
_LARGEST = 65_536
_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.ToImage, v2.ToDtype, v2.Normalize, ResizeKeepRatio, CenterCropOrPad)


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """What the model's images must go through, as plain JSON values.

    Returns:
        input_size [3, height, width], mean and std (of values in 0..1), interpolation, crop_pct and crop_mode
        ("center", "squash" or "border"), as `timm.data.resolve_model_data_config` gives them.
    """
    config = {**timm.data.resolve_model_data_config(model), **timm.models.get_model_input_config(model)}
    return {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in _KEYS}


def build_transforms(preprocessing: Mapping[str, Any], train: bool, augment: str = "none") -> v2.Compose:
    """The transform from an image (PIL RGB, or uint8 tensor (..., 3, H, W)) to a normalised float32 tensor.

    Args:
        preprocessing: As `preprocessing_of` returns it; missing keys take timm's defaults.
        train: Whether to augment; an evaluation transform ignores `augment`.
        augment: "none" (the evaluation transform), "light" (mild crops and changes of light; no flip, so fit for
            characters and other images that have a right way round) or "standard" (wider crops, horizontal flip,
            RandAugment (1909.13719) and random erasing (1708.04896), for photographs).

    Raises:
        VizattnError: Unknown augmentation or preprocessing key, or a value that makes no sense.
    """
    settings = check_preprocessing(preprocessing)
    if augment not in AUGMENTATIONS:
        raise unknown("augmentation", augment, AUGMENTATIONS)
    size = list(settings["input_size"][1:])
    interpolation = str_to_interp_mode(settings["interpolation"])
    after: list[Callable[[Any], Any]] = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(settings["mean"]), std=list(settings["std"])),
    ]
    if not train or augment == "none":
        return v2.Compose([*_evaluation_crop(size, settings), *after])
    if augment == "light":
        crop = v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18), interpolation=interpolation)
        return v2.Compose([crop, v2.ColorJitter(brightness=0.2, contrast=0.2), *after])
    crop = v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=interpolation)
    fill = [round(255 * value) for value in settings["mean"]]
    randaugment = v2.RandAugment(num_ops=2, magnitude=9, interpolation=interpolation, fill=fill)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), randaugment, *after, v2.RandomErasing(p=0.1)])


def check_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """A complete copy of `preprocessing`, with timm's defaults for what may be missing.

    Raises:
        VizattnError: Unknown or missing key, or a value that makes no sense.
    """
    if not isinstance(preprocessing, Mapping):
        raise VizattnError(f"The preprocessing must be a dict of {', '.join(_KEYS)}, not {preprocessing!r}.")
    for key in preprocessing:
        if key not in _KEYS:
            raise unknown("preprocessing key", key, _KEYS)
    settings = {"crop_pct": None, "crop_mode": "center", "interpolation": "bicubic", **preprocessing}
    missing = [key for key in ("input_size", "mean", "std") if key not in settings]
    if missing:
        raise VizattnError(
            f"The preprocessing lacks {', '.join(missing)}; it has {', '.join(preprocessing) or 'nothing'}."
        )

    _check_values(settings)
    return settings


def _check_values(settings: Mapping[str, Any]) -> None:
    size, crop_pct = settings["input_size"], settings["crop_pct"]
    if not _is_sequence(size, int, 3) or min(size) < 1 or max(size) > _LARGEST or size[0] != 3:
        raise VizattnError(
            f"The preprocessing's input_size must be [3, height, width] in pixels up to {_LARGEST}, not {size!r}."
        )
    for key in ("mean", "std"):
        if not _is_sequence(settings[key], int | float, 3):
            raise VizattnError(f"The preprocessing's {key} must be three numbers, not {settings[key]!r}.")
    if 0 in settings["std"]:
        raise VizattnError("The preprocessing's std must not be 0.")
    if crop_pct is not None and not (isinstance(crop_pct, int | float) and 0.1 <= crop_pct <= 10):
        raise VizattnError(f"The preprocessing's crop_pct must be a number from 0.1 to 10, not {crop_pct!r}.")
    if settings["interpolation"] not in _INTERPOLATIONS:
        raise unknown("interpolation", settings["interpolation"], _INTERPOLATIONS)


def _is_sequence(value: Any, kind: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length and all(isinstance(v, kind) for v in value)


def _evaluation_crop(size: list[int], settings: Mapping[str, Any]) -> list[Callable[[Any], Any]]:
    """timm's three crop modes: resize to size / crop_pct, then take the middle."""
    crop_pct = settings["crop_pct"] or timm.data.DEFAULT_CROP_PCT
    scaled = [math.floor(side / crop_pct) for side in size]
    name, interpolation = settings["interpolation"], str_to_interp_mode(settings["interpolation"])
    mode = settings["crop_mode"]
    if mode == "squash":
        return [v2.Resize(scaled, interpolation=interpolation), v2.CenterCrop(size)]
    if mode == "border":
        fill = tuple(round(255 * value) for value in settings["mean"])
        return [ResizeKeepRatio(scaled, interpolation=name, longest=1.0), CenterCropOrPad(size, fill=fill)]
    if mode not in ("center", None):
        raise unknown("crop mode", mode, ("center", "squash", "border"))
    if scaled[0] == scaled[1]:
        return [v2.Resize(scaled[0], interpolation=interpolation), v2.CenterCrop(size)]
    return [ResizeKeepRatio(scaled, interpolation=name), v2.CenterCrop(size)]


def is_deterministic(transform: Callable[[Any], Any] | None) -> bool:
    """Whether the transform always gives the same tensor for the same image; False for callables it does not know."""
    if isinstance(transform, v2.Compose):
        return all(is_deterministic(step) for step in transform.transforms)
    if isinstance(transform, ResizeKeepRatio):
        return transform.random_scale_prob == 0 and transform.random_aspect_prob == 0
    if isinstance(transform, _DETERMINISTIC):
        return True
    return transform is None or getattr(transform, "deterministic", False)  # the attribute: of image and mask


def transform_identity(transform: Callable[[Any], Any] | None) -> str:
    """Hash that is equal for equal deterministic transforms, in any process: part of a feature cache's key.

    Raises:
        ValueError: The transform is random, or not known to be deterministic.
    """
    if not is_deterministic(transform):
        raise ValueError(f"Only a deterministic transform has an identity, not {transform}")
    if identity := getattr(transform, "identity", None):
        return str(identity)
    steps = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    described = [(type(step).__name__, sorted(_plain_options(step).items())) for step in steps]
    return hashlib.sha256(repr(described).encode()).hexdigest()


def _plain_options(step: object) -> dict[str, str]:
    return {key: str(value) for key, value in vars(step).items() if not key.startswith("_") and key != "training"}
