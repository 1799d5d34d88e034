"""A look at a segmentation folder before training: what cannot be used, what the masks hold, and what to set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from vizattn.data.class_names import NAME_FILES, find_class_names
from vizattn.data.masks import IGNORE_INDEX, count_labels, image_sizes
from vizattn.data.segmentation import mask_problems, read_classes
from vizattn.data.segmentation_layouts import Pair, find_pairs
from vizattn.errors import VizattnError

__all__ = ["Audit", "Split", "audit"]


@dataclass
class Split:
    """What one split holds; the lists go by class.

    Attributes:
        pairs: Images with masks that can be used.
        pixels: Pixels of each class.
        images: Images that show each class.
        ignored: Pixels that count for no class.
    """

    pairs: int
    pixels: list[int]
    images: list[int]
    ignored: int


@dataclass
class Audit:
    """What `audit` found.

    Attributes:
        root: The folder that has the layout.
        layout: "folders", "ade20k", "voc" or "cityscapes".
        class_names: Names of the classes.
        splits: By name.
        unusable: Images that are left out of training and evaluation, each with the reason.
        masks_without_image: Masks whose image is missing.
        out_of_range: Masks with labels that are no class, and these labels (after `reduce_zero_label`).
        all_ignored: Masks without a single pixel that counts.
        as_stored: Images whose masks fit them as stored, and not as their EXIF orientation turns them.
        heights: Least, median and greatest height of the images in pixels.
        widths: The same of their width.
        mask_modes: How many masks have each mode of Pillow's: "P" (palette), "L" (greyscale), "I;16", "RGB", ...
        advice: What to do or set, in sentences; empty if all is well.
    """

    root: str
    layout: str
    class_names: list[str]
    splits: dict[str, Split] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    masks_without_image: list[str] = field(default_factory=list)
    out_of_range: dict[str, list[int]] = field(default_factory=dict)
    all_ignored: list[str] = field(default_factory=list)
    as_stored: list[str] = field(default_factory=list)
    heights: tuple[int, int, int] = (0, 0, 0)
    widths: tuple[int, int, int] = (0, 0, 0)
    mask_modes: dict[str, int] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def least_side(self) -> int:
        """The shorter of median height and width, in pixels."""
        return min(self.heights[1], self.widths[1])

    @property
    def crop_size(self) -> int | None:
        """A `data.crop_size` for training in batches; None if the images are of one size."""
        if self.heights[0] == self.heights[2] and self.widths[0] == self.widths[2]:
            return None
        return max(32, min(512, self.least_side // 32 * 32))

    @property
    def ok(self) -> bool:
        """Whether every file can be used, every label is a class, and there are two classes or more."""
        wrong = self.unusable or self.masks_without_image or self.out_of_range or self.all_ignored
        return not wrong and len(self.class_names) > 1

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {**asdict(self), "ok": self.ok}


def audit(
    root: str | os.PathLike[str],
    *,
    layout: str = "auto",
    reduce_zero_label: bool = False,
    class_names: Sequence[str] | None = None,
) -> Audit:
    """Reads every image and every mask of a folder; see `SegmentationFolder` for the arguments.

    Raises:
        VizattnError: No pairs at all, an unknown layout, class names that make no sense.
    """
    found = find_pairs(root, layout)
    advice = []
    try:
        names = find_class_names(found, reduce_zero_label, class_names)
    except VizattnError as error:
        if class_names is not None:
            raise
        advice.append(str(error))
        names = ["class 0"]
    result = Audit(found.root, found.layout, names, masks_without_image=found.without_image, advice=advice)
    sizes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    palettes: dict[bytes, str] = {}
    occurring: set[int] = set()
    for split, pairs in found.splits.items():
        problems = dict.fromkeys(found.without_mask.get(split, []), "there is no mask for it")
        problems |= mask_problems(pairs, whole=True)
        result.unusable |= problems
        usable = [pair for pair in pairs if pair.image not in problems]
        counts = np.zeros((len(usable), len(names)), dtype=np.int64)
        ignored = 0
        for row, (pair, looked) in enumerate(zip(usable, _map(lambda pair: _look(pair, reduce_zero_label), usable))):
            size, mode, palette, labels = looked
            sizes.append(size)
            if image_sizes(pair.image)[1] != size:
                result.as_stored.append(pair.image)
            modes[mode] += 1
            palettes.setdefault(palette[: 3 * len(names)], pair.mask)
            occurring |= labels.keys()
            ignored += labels.pop(IGNORE_INDEX, 0)
            if not labels:
                result.all_ignored.append(pair.mask)
            for label, pixels in labels.items():
                if 0 <= label < len(names):
                    counts[row, label] = pixels
                else:
                    result.out_of_range.setdefault(pair.mask, []).append(label)
        pixels_of, images_of = counts.sum(0).tolist(), (counts > 0).sum(0).tolist()
        result.splits[split] = Split(len(usable), pixels_of, images_of, ignored)
    if sizes:
        widths, heights = np.array(sizes).T
        result.widths, result.heights = _range(widths), _range(heights)
    result.mask_modes = dict(modes)
    result.advice += _differing(palettes)
    result.advice += _advice(result, occurring, reduce_zero_label, class_names is not None)
    return result


def _look(pair: Pair, reduce_zero_label: bool) -> tuple[tuple[int, int], str, bytes, dict[int, int]]:
    """Size of the mask, its mode, its palette if any, and how many pixels each class has."""
    classes = read_classes(pair.mask, reduce_zero_label)
    with Image.open(pair.mask) as image:
        mode, palette = image.mode, bytes((image.mode == "P" and image.getpalette("RGB")) or [])
    return (classes.shape[1], classes.shape[0]), mode, palette, count_labels(classes)


def _differing(palettes: dict[bytes, str]) -> list[str]:
    """A sentence if one palette is not the beginning of the next; files that have none do not matter."""
    longest_last = sorted((palette for palette in palettes if palette), key=len)
    for shorter, longer in pairwise(longest_last):
        if not longer.startswith(shorter):
            return [
                f"The palettes of {palettes[shorter]} and {palettes[longer]} differ: see that each label means the "
                "same class in both, as the labels count and not the colours."
            ]
    return []


def _map(function: Any, items: Sequence[Pair]) -> Iterable[Any]:
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        yield from pool.map(function, items)


def _range(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _advice(result: Audit, occurring: set[int], reduce_zero_label: bool, named: bool) -> list[str]:
    advice = []
    classes = len(result.class_names)
    if count := len(result.unusable):
        advice.append(
            f"Images that cannot be used: {count}. Repair or remove them; training leaves them out, or stops with "
            'data.on_error="stop".'
        )
    if count := len(result.masks_without_image):
        advice.append(f"Masks without an image: {count}. Are names or folders mistaken?")
    if count := len(result.all_ignored):
        advice.append(f"Masks that ignore every pixel: {count}. Remove them, nothing can be learnt there.")
    if count := len(result.as_stored):
        advice.append(
            f"Images whose masks do not follow their EXIF orientation, such as {result.as_stored[0]}: {count}. "
            "Training sees these as stored, but `vizattn predict` turns them: remove the orientation."
        )
    if result.out_of_range:
        highest = max(label for labels in result.out_of_range.values() for label in labels)
        repair = f"write {IGNORE_INDEX} where a pixel is of no class."
        if highest < IGNORE_INDEX:
            repair = f"name {highest + 1} in classes.txt or data.class_names, or {repair}"
        else:
            repair = f"at most {IGNORE_INDEX} fit into masks, numbered from 0 on, and {repair}"
        advice.append(f"Labels go up to {highest}, but there are {classes} classes: {repair}")
    counted = occurring - {IGNORE_INDEX}
    if result.layout == "ade20k" and not reduce_zero_label:
        advice.append("ADE20K's label 0 stands for no class: set data.reduce_zero_label=True.")
    elif not reduce_zero_label and counted and 0 not in counted:
        advice.append("No mask has label 0: if the labels begin at 1, set data.reduce_zero_label=True.")
    for split in ("train", "val"):
        if split in result.splits:
            missing = [n for n, pixels in zip(result.class_names, result.splits[split].pixels) if not pixels]
            if missing:
                shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
                advice.append(f"No pixel of {split} is {shown}.")
        else:
            advice.append(f"There is no {split} split.")
    if not named and result.class_names[:2] == ["class 0", "class 1"]:
        advice.append(f"The classes have no names: write one a line into {NAME_FILES[0]} in {result.root}.")
    if crop := result.crop_size:
        advice.append(f"The images differ in size: training in batches needs data.crop_size, such as {crop}.")
    return advice
