"""Data sets and image transforms.

Those for classification give `(image, label)`, with the image after the transform, and have `labels`. Those for
segmentation give `(image, mask)`, both after the transform, and have `palette` and `ignore_index`. All have
`class_names` and `identity`: a hash of which images come in which order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from vizattn.data.segmentation_transforms import build_segmentation_transforms
from vizattn.data.transforms import build_transforms, is_deterministic, preprocessing_of, transform_identity
from vizattn.errors import VizattnError, unknown

__all__ = [
    "DATASETS",
    "SPLITS",
    "TASK_OF",
    "available_splits",
    "build_dataset",
    "build_segmentation_transforms",
    "build_transforms",
    "is_deterministic",
    "preprocessing_of",
    "transform_identity",
]

SPLITS = ("train", "val", "test")
# The options each data set understands, beside root.
DATASETS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "glyphs": ("length", "seed"),
    "folder": ("val_fraction", "test_fraction", "seed", "on_error", "least_side"),
    "scenes": ("length", "seed"),
    "segmentation_folder": (
        "layout",
        "reduce_zero_label",
        "class_names",
        "val_fraction",
        "test_fraction",
        "seed",
        "on_error",
    ),
    "transfer": ("suite", "task_name", "stage"),
}
TASK_OF = {name: "segmentation" if name in ("scenes", "segmentation_folder") else "classification" for name in DATASETS}


def build_dataset(
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    transform: Callable[..., Any] | None = None,
    **options: Any,
) -> Dataset:
    """A data set by name.

    Args:
        name: A key of `DATASETS`.
        split: "train", "val" or "test"; for "folder" also "all", see `ImageFolder`.
        root: Where the images are; for "folder", "segmentation_folder" and "transfer" only.
        transform: Applied to each image (PIL RGB; see `Glyphs` for its tensors), for segmentation to image and mask.
            Without it items are PIL images with labels, or with uint8 masks.
        options: See `Glyphs`, `ImageFolder`, `Scenes`, `SegmentationFolder` and `open_stage`. An option that only other
            data sets have is left unused, so that a recipe's data section holds for each of them.

    Raises:
        VizattnError: Unknown name, split or option; for folders, what `ImageFolder` and `SegmentationFolder`
            raise.
    """
    chosen = _options(name, split, options)
    if name == "digits":
        from vizattn.data.digits import Digits

        return Digits(split, transform)
    if name == "glyphs":
        from vizattn.data.glyphs import Glyphs

        return Glyphs(split, transform, **chosen)
    if name == "scenes":
        from vizattn.data.scenes import Scenes

        return Scenes(split, transform, **chosen)
    if name == "segmentation_folder":
        from vizattn.data.segmentation import SegmentationFolder

        return SegmentationFolder(_root(name, root), split, transform, **chosen)
    if name == "transfer":
        from vizattn.data.transfer import open_stage

        return open_stage(split, root, transform, **chosen)
    from vizattn.data.folder import ImageFolder

    return ImageFolder(_root(name, root), split, transform, **chosen)


def available_splits(name: str, *, root: str | os.PathLike[str] | None = None, **options: Any) -> list[str]:
    """The splits that `build_dataset` can build: all three, except where a folder or a stage lacks some of them."""
    chosen = _options(name, "train", options)
    for option in ("on_error", "least_side"):
        chosen.pop(option, None)
    if name == "segmentation_folder":
        from vizattn.data.segmentation import segmentation_splits

        for option in ("reduce_zero_label", "class_names"):
            chosen.pop(option, None)
        return segmentation_splits(_root(name, root), **chosen)
    if name == "transfer":
        from vizattn.data.transfer import stage_splits

        return list(stage_splits(**{key: value for key, value in chosen.items() if key == "stage"}))
    if name != "folder":
        return list(SPLITS)
    from vizattn.data.folder import folder_splits

    return folder_splits(_root(name, root), **chosen)


def _options(name: str, split: str, options: dict[str, Any]) -> dict[str, Any]:
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    if split not in SPLITS and not (name == "folder" and split == "all"):
        raise unknown("split", split, SPLITS)
    known = {option for names in DATASETS.values() for option in names}
    for option in options:
        if option not in known:
            raise unknown("data option", option, known)
    return {option: options[option] for option in DATASETS[name] if option in options}


def _root(name: str, root: str | os.PathLike[str] | None) -> str:
    if root is None:
        raise VizattnError(f'The data set "{name}" needs its folder: set data.root, or give --data DIR.')
    return os.fspath(root)
