"""Mask files: reading label numbers from any of their kinds, and turning those into class indices."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from vizattn.data.images import quiet
from vizattn.errors import VizattnError
from vizattn.files import check_regular

__all__ = [
    "IGNORE_INDEX",
    "check_labels",
    "count_labels",
    "distinct",
    "image_sizes",
    "palette_of",
    "read_mask",
    "size_problem",
    "to_classes",
    "voc_palette",
]

IGNORE_INDEX = 255
"""Pixels of this index count neither in the loss nor in the metric."""

# Cityscapes' labelIds to its train ids; all other ids are ignored.
_CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def voc_palette(count: int = 256) -> list[tuple[int, int, int]]:
    """The colours of Pascal VOC: the bits of an index go in turn to red, green and blue, from the highest bit down."""
    colours = []
    for index in range(count):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append((rgb[0], rgb[1], rgb[2]))
    return colours


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """The label numbers in a file, (H, W), as uint8 or int32.

    Palette images give their indices, greyscale images their values (of 16 bits too, where 255 is ignored as in 8, and
    so is 65535), and colour images the index of each colour in Pascal VOC's palette, or their grey values if they are
    grey.

    Raises:
        OSError: The file cannot be read, or holds no labels: JPEG, which changes values, or other colours.
    """
    check_regular(path)
    try:
        with quiet(), Image.open(path) as image:
            if image.format == "JPEG":
                raise OSError("a JPEG file cannot hold labels, as it changes their values; save masks as PNG")
            # Pillow spreads the values of 2 and 4 bits over 0 to 255.
            spread = {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args) if image.tile else "", 1)
            image.load()
            return _labels(image) // spread
    except OSError:
        raise
    except Exception as error:  # decoders raise all kinds
        raise OSError(f"{type(error).__name__}: {error}") from error


def _labels(image: Image.Image) -> np.ndarray:
    if image.mode in ("P", "L", "1"):
        return np.asarray(image).astype(np.uint8)
    if image.mode[0] == "I":
        labels = np.asarray(image).astype(np.int32)
        return np.where((labels == 65535) | (labels == -1), IGNORE_INDEX, labels)  # all bits set, as 255 in 8 bits
    if image.mode in ("LA", "PA"):
        return np.asarray(image.getchannel(0)).astype(np.uint8)
    if image.mode not in ("RGB", "RGBA", "RGBX"):
        raise OSError(f"a mask of mode {image.mode} holds no labels; save masks as palette or greyscale PNG")
    pixels = np.asarray(image)[..., :3].astype(np.int32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    known, indices = _voc_codes()
    place = np.searchsorted(known, codes).clip(max=len(known) - 1)
    strange = known[place] != codes
    if not strange.any():
        return indices[place]
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0].astype(np.uint8)
    y, x = np.argwhere(strange)[0]
    raise OSError(
        f"the colour {tuple(pixels[y, x].tolist())} at row {y}, column {x} is not in Pascal VOC's palette; save "
        "masks as palette or greyscale PNG whose values are label numbers"
    )


@functools.cache
def _voc_codes() -> tuple[np.ndarray, np.ndarray]:
    """Colours of the palette as sorted numbers, and the index of each."""
    codes = np.array([red << 16 | green << 8 | blue for red, green, blue in voc_palette()])
    order = np.argsort(codes)
    return codes[order], order.astype(np.uint8)


def to_classes(labels: np.ndarray, *, reduce_zero_label: bool = False, cityscapes: bool = False) -> np.ndarray:
    """Label numbers as class indices, of the same shape and type, with `IGNORE_INDEX` where there is no class.

    Args:
        labels: As `read_mask` gives them.
        reduce_zero_label: Label 0 is ignored, and label n is class n - 1, as customary on ADE20K.
        cityscapes: The labels are Cityscapes' labelIds.
    """
    if cityscapes:
        table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        table[_CITYSCAPES] = np.arange(len(_CITYSCAPES))
        return table[np.where((labels < 0) | (labels > 255), IGNORE_INDEX, labels)]
    if reduce_zero_label:
        return np.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - labels.dtype.type(1))
    return labels


def check_labels(classes: np.ndarray, num_classes: int, path: str) -> np.ndarray:
    """`classes` as uint8, if all of them are below `num_classes` or ignored.

    Raises:
        VizattnError: Some are not.
    """
    wrong = (classes != IGNORE_INDEX) & ((classes < 0) | (classes >= num_classes))
    if wrong.any():
        found = np.unique(classes[wrong]).tolist()
        shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise VizattnError(
            f"{path} has class {shown}, but there are {num_classes} classes: 0 to {num_classes - 1}, and "
            f"{IGNORE_INDEX} for what is ignored. Name all classes, by a classes.txt or data.class_names; if label 0 "
            "stands for nothing, set data.reduce_zero_label=True. `vizattn data check DIR` lists such files."
        )
    return classes.astype(np.uint8)


def palette_of(path: str, count: int) -> list[tuple[int, int, int]] | None:
    """The first `count` colours of a palette image; None for others, and where colours are missing, equal or grey."""
    try:
        check_regular(path)
        with Image.open(path) as image:
            values = image.getpalette("RGB") if image.mode == "P" else None
    except Exception:
        return None
    colours = list(zip(*[iter(values or [])] * 3))[:count]
    coloured = any(len(set(colour)) > 1 for colour in colours)
    return colours if coloured and len(set(colours)) == count else None


def size_problem(image: str, mask: str) -> str | None:
    """How the sizes of an image and its mask differ, upright or as stored, by the files' headers."""
    stored, upright, labels = *image_sizes(image), image_sizes(mask)[0]
    if labels in (stored, upright):
        return None
    return f"the image has {upright[0]} x {upright[1]} pixels, its mask {labels[0]} x {labels[1]}"


def image_sizes(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height as stored, and upright: as the EXIF orientation turns the image."""
    with Image.open(path) as image:
        try:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # orientations that swap the sides
        except Exception:  # damaged metadata
            turned = False
        return image.size, image.size[::-1] if turned else image.size


def distinct(paths: Sequence[str]) -> set[int]:
    """Label numbers that occur in the mask files; those that cannot be read are left out."""
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        return set().union(*pool.map(_distinct, paths))


def _distinct(path: str) -> frozenset[int]:
    status = os.stat(path)
    return _distinct_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 20)
def _distinct_of(path: str, size: int, mtime_ns: int) -> frozenset[int]:
    """Remembered for as long as the file's size and time of change stay the same."""
    try:
        return frozenset(count_labels(read_mask(path)))
    except OSError:
        return frozenset()


def count_labels(labels: np.ndarray) -> dict[int, int]:
    """The labels that occur, in order, and their numbers of pixels."""
    if labels.dtype == np.uint8:
        return {label: int(count) for label, count in enumerate(np.bincount(labels.ravel())) if count}
    found, counts = np.unique(labels, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist()))
