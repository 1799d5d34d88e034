"""Images with masks in folders, for segmentation."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vizattn.data.class_names import find_class_names, find_palette
from vizattn.data.folder import listed
from vizattn.data.images import load_rgb, unreadable
from vizattn.data.masks import (
    IGNORE_INDEX,
    check_labels,
    image_sizes,
    read_mask,
    size_problem,
    to_classes,
)
from vizattn.data.segmentation_layouts import Pair, find_pairs
from vizattn.errors import VizattnError, unknown

__all__ = ["SegmentationFolder", "mask_problems", "read_classes", "segmentation_splits"]


class SegmentationFolder(Dataset):
    """One split of a folder of images and masks.

    An item is an image (PIL RGB) and its mask (uint8 (H, W): positions in `class_names`, 255 where ignored) through
    `transform`. See `find_pairs` for the layouts and `read_mask` for the kinds of masks. An image is turned as its EXIF
    orientation says, as in prediction, unless its mask fits only the image as stored.

    Class names come from `class_names`, or from a classes.txt, class_names.txt or labels.txt in the folder (one name a
    line, or "index: name"), or are those of Pascal VOC, Cityscapes or ADE20K where layout and names of the files say
    so; otherwise the masks are read once to count the classes.

    Files that cannot be read, images without a mask, and masks of another size than their image are looked for at
    construction, as in `ImageFolder`: val and test are decoded whole, train by header and end of file. Damage that only
    shows in training gives the next image instead; in evaluation it is an error. Labels out of range always are.

    Args:
        root: The folder.
        split: "train", "val" or "test".
        transform: Gets image and mask.
        layout: "folders", "ade20k", "voc", "cityscapes" or "auto".
        reduce_zero_label: Label 0 is ignored and label n is class n - 1.
        class_names: Names of all classes.
        on_error: "skip" (warn, naming what is wrong, and go on without it) or "stop" (raise).
        val_fraction: Share for validation where that is split automatically.
        test_fraction: The same for the test split.
        seed: Of the automatic split.

    Attributes:
        class_names: Names of the classes.
        palette: Their colours, (red, green, blue): those of the masks where they have a palette.
        paths: Images, absolute, ordered by name.
        mask_paths: Their masks.
        skipped: Images that were left out, each with the reason.
        ignore_index: 255.
        identity: Hash over the classes, and names, sizes and times of change of the files.

    Raises:
        VizattnError: Missing or empty folder or split, an unknown or senseless option; with `on_error="stop"`, anything
            that would be skipped.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[[Any, np.ndarray], Any] | None = None,
        *,
        layout: str = "auto",
        reduce_zero_label: bool = False,
        class_names: Sequence[str] | None = None,
        on_error: str = "skip",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        if on_error not in ("skip", "stop"):
            raise unknown("value of on_error", on_error, ("skip", "stop"))
        found = find_pairs(root, layout, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        self.root = found.root
        self.split = split
        self.transform = transform
        self.on_error = on_error
        self.reduce_zero_label = reduce_zero_label
        if split not in found.splits:
            raise VizattnError(f"There is no {split} split in {self.root}; it has {', '.join(found.splits)}.")
        self.class_names = find_class_names(found, reduce_zero_label, class_names)
        pairs = found.splits[split]
        self.skipped = dict.fromkeys(found.without_mask.get(split, []), "there is no mask for it")
        self.skipped |= mask_problems(pairs, whole=split != "train")
        self._report()
        pairs = [pair for pair in pairs if pair.image not in self.skipped]
        if not pairs:
            reasons = listed(f"{path}: {reason}" for path, reason in self.skipped.items())
            raise VizattnError(f"The {split} split of {self.root} has no image that can be used:\n{reasons}")
        self.paths = [pair.image for pair in pairs]
        self.mask_paths = [pair.mask for pair in pairs]
        self.palette = find_palette(found.layout, self.mask_paths[0], len(self.class_names), reduce_zero_label)
        self.identity = self._identity(pairs)
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, mask = self._load(index)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def _load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        index = range(len(self))[index]
        for place in (*range(index, len(self)), *range(index)):
            path, mask_path = self.paths[place], self.mask_paths[place]
            try:
                classes = read_classes(mask_path, self.reduce_zero_label)
                image = load_rgb(path, upright=image_sizes(path)[1] == classes.shape[::-1])
                if image.size != classes.shape[::-1]:
                    raise OSError(size_problem(path, mask_path) or "its mask has another size")
            except OSError as error:
                if self.on_error == "stop" or self.split != "train":
                    raise VizattnError(f"Cannot use the image {path} with the mask {mask_path}: {error}") from None
                if path not in self._warned:
                    self._warned.add(path)
                    warnings.warn(f"Another image stands in for {path}: {error}", stacklevel=2)
                continue
            return image, check_labels(classes, len(self.class_names), mask_path)
        raise VizattnError(f"No image with its mask can be read any more in {self.root}.")

    def _report(self) -> None:
        if not self.skipped:
            return
        reasons = listed(f"{path}: {reason}" for path, reason in self.skipped.items())
        if self.on_error == "stop":
            raise VizattnError(
                f"{len(self.skipped)} images of the {self.split} split cannot be used:\n{reasons}\n"
                'Repair or remove them, or leave them out with data.on_error="skip".'
            )
        warnings.warn(
            f"Left out of the {self.split} split, {len(self.skipped)} images that cannot be used:\n{reasons}",
            stacklevel=3,
        )

    def _identity(self, pairs: Sequence[Pair]) -> str:
        digest = hashlib.sha256(repr((self.class_names, self.reduce_zero_label)).encode())
        for pair in pairs:
            status = [os.stat(path) for path in (pair.image, pair.mask)]
            digest.update(repr((pair.name, *((s.st_size, s.st_mtime_ns) for s in status))).encode())
        return digest.hexdigest()


def segmentation_splits(
    root: str | os.PathLike[str],
    layout: str = "auto",
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[str]:
    """The names of the splits that `SegmentationFolder` can give.

    Raises:
        VizattnError: As `SegmentationFolder`.
    """
    found = find_pairs(root, layout, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    return list(found.splits)


def read_classes(mask_path: str, reduce_zero_label: bool) -> np.ndarray:
    """Class indices of a mask file, (H, W), not checked for their range.

    Raises:
        OSError: As `read_mask`.
    """
    cityscapes = mask_path.endswith("_gtFine_labelIds.png")
    return to_classes(read_mask(mask_path), reduce_zero_label=reduce_zero_label, cityscapes=cityscapes)


def mask_problems(pairs: Sequence[Pair], whole: bool) -> dict[str, str]:
    """Images of pairs that cannot be used, each with the reason; see `vizattn.data.images.unreadable` for `whole`."""
    problems = unreadable([pair.image for pair in pairs], whole)
    bad = unreadable([pair.mask for pair in pairs], whole)
    problems |= {
        pair.image: f"its mask {pair.mask}: {bad[pair.mask]}"
        for pair in pairs
        if pair.mask in bad and pair.image not in problems
    }
    rest = [pair for pair in pairs if pair.image not in problems]
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        reasons = pool.map(lambda pair: size_problem(pair.image, pair.mask) or _no_labels(pair.mask, whole), rest)
    problems |= {pair.image: reason for pair, reason in zip(rest, reasons) if reason}
    return {pair.image: problems[pair.image] for pair in pairs if pair.image in problems}


def _no_labels(mask: str, whole: bool) -> str | None:
    with Image.open(mask) as image:
        doubtful = image.format == "JPEG" or image.mode not in ("1", "L", "P")
    if not (whole or doubtful):
        return None
    try:
        read_mask(mask)
    except OSError as error:
        return f"its mask {mask}: {error}"
    return None
