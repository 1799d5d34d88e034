"""Loading images: decoding, resizing and augmentation, in one process and in several, beside PIL, torchvision and timm.

One run is a pass over all files of a folder; the figure is images a second. The unit is decoding alone, by PIL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vizattn.bench.case import Case, Options, Work
from vizattn.bench.ops import text_of
from vizattn.bench.pictures import pairs, pictures
from vizattn.data import build_dataset, build_segmentation_transforms, build_transforms
from vizattn.data.images import load_rgb
from vizattn.data.loader import build_loader

__all__ = ["cases"]

INPUT = 224
CROP = (512, 512)
PREPROCESSING = {
    "input_size": [3, INPUT, INPUT],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}
UNIT = "PIL: decode"
REDUCED = "vizattn, least_side"


def count_of(size: tuple[int, int]) -> int:
    """Files a folder: as many as take about a second."""
    return max(8, min(96, 20_000_000 // (size[0] * size[1])))


def _pass(load: Callable[[int], object], count: int) -> Work:
    return Work(lambda: [load(i) for i in range(count)], images=count)


def _epoch(loader: Any, count: int) -> Work:
    return Work(lambda: [None for _ in loader], images=count)


# Classification -----------------------------------------------------------------------------------------------------


def decode(folder: Path, size: tuple[int, int], by: str) -> Work:
    """Files to RGB."""
    paths = sorted(pictures(folder, size, count_of(size)).rglob("*.jpg"))
    if by == "PIL":
        return _pass(lambda i: Image.open(paths[i]).convert("RGB"), len(paths))
    if by == "torchvision":
        from torchvision.io import ImageReadMode, decode_image

        return _pass(lambda i: decode_image(str(paths[i]), mode=ImageReadMode.RGB), len(paths))
    return _pass(lambda i: load_rgb(paths[i], least_side=2 * INPUT if by == REDUCED else None), len(paths))


def our_images(folder: Path, size: tuple[int, int], augment: str, batch: int, workers: int | None) -> Work:
    """`ImageFolder` with one of our transforms, item by item, or through `build_loader`."""
    root = pictures(folder, size, count_of(size))
    transform = build_transforms(PREPROCESSING, train=augment != "none", augment=augment)
    dataset: Any = build_dataset("folder", "train", root=root, transform=transform, val_fraction=0.0)
    if workers is None:
        return _pass(dataset.__getitem__, len(dataset))
    return _epoch(build_loader(dataset, batch, train=True, num_workers=workers), len(dataset))


def timm_images(folder: Path, size: tuple[int, int], augment: str, batch: int, workers: int | None) -> Work:
    """torchvision's folder with timm's transform."""
    from timm.data import create_transform
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    training = augment != "none"
    policy: dict[str, Any] = {"auto_augment": "rand-m9-n2-p1", "scale": (0.25, 1.0), "re_prob": 0.1} if training else {}
    transform = create_transform(INPUT, is_training=training, interpolation="bicubic", **policy)
    dataset = ImageFolder(str(pictures(folder, size, count_of(size)) / "train"), transform)
    if workers is None:
        return _pass(dataset.__getitem__, len(dataset))
    return _epoch(DataLoader(dataset, batch, shuffle=True, num_workers=workers), len(dataset))


# Segmentation -------------------------------------------------------------------------------------------------------


def decode_pairs(folder: Path, size: tuple[int, int], by: str) -> Work:
    """Images to RGB, masks to labels."""
    root = pairs(folder, size, count_of(size))
    if by == "PIL":
        images, masks = (sorted((root / kind / "train").iterdir()) for kind in ("images", "masks"))
        return _pass(
            lambda i: (Image.open(images[i]).convert("RGB"), np.asarray(Image.open(masks[i]))),
            len(images),
        )
    dataset: Any = build_dataset("segmentation_folder", "train", root=root, val_fraction=0.0)
    return _pass(dataset.__getitem__, len(dataset))


def our_pairs(folder: Path, size: tuple[int, int], augment: str, batch: int, workers: int | None) -> Work:
    """`SegmentationFolder` with one of our transforms, item by item, or through `build_loader`."""
    root = pairs(folder, size, count_of(size))
    training = augment != "none"
    transform = build_segmentation_transforms(
        PREPROCESSING, train=training, augment=augment, crop_size=CROP if training else None
    )
    dataset: Any = build_dataset("segmentation_folder", "train", root=root, transform=transform, val_fraction=0.0)
    if workers is None:
        return _pass(dataset.__getitem__, len(dataset))
    return _epoch(build_loader(dataset, batch, train=True, num_workers=workers), len(dataset))


def cases(options: Options) -> list[Case]:
    """Both tasks at each size of the files."""
    assert options.folder is not None
    found = []
    for batch in options.batches or (32,):
        for size in options.sizes or ((375, 500), (1536, 2048)):
            found += _classification(options.folder, size, batch)
        for size in options.sizes or ((512, 683),):
            found += _segmentation(options.folder, size, batch)
    return found


def _classification(folder: Path, size: tuple[int, int], batch: int) -> list[Case]:
    builds = {
        f"{by}: decode": functools.partial(decode, folder, size, by)
        for by in ("PIL", "torchvision", "vizattn", REDUCED)
    }
    for augment in ("none", "light", "standard"):
        builds[f"vizattn: {augment}"] = functools.partial(our_images, folder, size, augment, batch, None)
        if augment != "light":
            builds[f"timm: {augment}"] = functools.partial(timm_images, folder, size, augment, batch, None)
    for workers in (0, 1, 2):
        for by, build in (("vizattn", our_images), ("timm", timm_images)):
            name = f"{by}: standard, {workers} workers"
            builds[name] = functools.partial(build, folder, size, "standard", batch, workers)
    return [_case("classification", name, build, size, batch) for name, build in builds.items()]


def _segmentation(folder: Path, size: tuple[int, int], batch: int) -> list[Case]:
    builds = {f"{by}: decode": functools.partial(decode_pairs, folder, size, by) for by in ("PIL", "vizattn")}
    for augment in ("none", "light", "standard"):
        builds[f"vizattn: {augment}"] = functools.partial(our_pairs, folder, size, augment, batch, None)
    for workers in (0, 1, 2):
        name = f"vizattn: standard, {workers} workers"
        builds[name] = functools.partial(our_pairs, folder, size, "standard", batch, workers)
    return [_case("segmentation", name, build, size, batch) for name, build in builds.items()]


def _case(subject: str, name: str, build: Callable[[], Work], size: tuple[int, int], batch: int) -> Case:
    return Case(
        group="data",
        subject=subject,
        name=name,
        build=build,
        mode="load",
        batch=batch,
        size=text_of(size),
        reference=name == UNIT,
        ours=name.startswith("vizattn"),
        arithmetic=False,
    )
