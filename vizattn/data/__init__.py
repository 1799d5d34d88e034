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
    "folder": ("val_fraction", "test_fraction", "seed", "on_error"),
    "scenes": ("length", "seed"),
}
TASK_OF = {name: "segmentation" if name == "scenes" else "classification" for name in DATASETS}


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
        root: Where the images are; for "folder" only.
        transform: Applied to each image (PIL RGB; see `Glyphs` for its tensors). Without it items are PIL images.
        options: See `Glyphs` and `ImageFolder`. An option that only other data sets have is left unused, so that a
            recipe's data section holds for each of them.

    Raises:
        VizattnError: Unknown name, split or option; for "folder", what `ImageFolder` raises.
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
    from vizattn.data.folder import ImageFolder

    return ImageFolder(_root(root), split, transform, **chosen)


def available_splits(name: str, *, root: str | os.PathLike[str] | None = None, **options: Any) -> list[str]:
    """The splits that `build_dataset` can build: all three, except for folders that lack some of them."""
    chosen = _options(name, "train", options)
    if name != "folder":
        return list(SPLITS)
    from vizattn.data.folder import folder_splits

    chosen.pop("on_error", None)
    return folder_splits(_root(root), **chosen)


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


def _root(root: str | os.PathLike[str] | None) -> str:
    if root is None:
        raise VizattnError('The data set "folder" needs its folder: set data.root, or give --data DIR.')
    return os.fspath(root)
