"""Image files: finding them, checking them, and decoding any of them to RGB."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

__all__ = ["IMAGE_SUFFIXES", "find_images", "load_rgb", "quiet", "unreadable"]

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif"}
    | {".tiff", ".webp"}
)
# How files that were written to the end finish; without it the file is decoded to see.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\x3b"}


def find_images(folder: str) -> list[str]:
    """Paths of the images below `folder`, relative to it with forward slashes, sorted; hidden files are left out."""
    found = []
    walked: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in walked:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in files:
            if not hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/"))
    return sorted(found)


def hidden(name: str) -> bool:
    """Whether a name is the system's own, not the user's."""
    return name.startswith(".") or name == "__MACOSX"


_quiet_lock = threading.Lock()
_quiet: list[Any] = []  # the saved filters, and an entry for each thread that is inside


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings: decoders remark on metadata, and failures are raised.

    For any number of threads at once: the first in saves the filters and the last out puts them back, where
    `warnings.catch_warnings` in each would leave them in disorder.
    """
    with _quiet_lock:
        if not _quiet:
            _quiet.append(warnings.catch_warnings())
            _quiet[0].__enter__()
            warnings.simplefilter("ignore")
        _quiet.append(None)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet.pop()
            if len(_quiet) == 1:
                _quiet.pop().__exit__()


@quiet()
def load_rgb(
    path: str | os.PathLike[str] | BinaryIO,
    upright: bool = True,
    least_side: int | None = None,
    *,
    max_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Decodes an image file to RGB.

    The EXIF orientation is applied if `upright`; of an animation or of pages the first is taken, and
    ``info["first_of_several"]`` of the result is True; transparent parts become white; 16-bit and float images are
    scaled to 8 bits.

    Args:
        path: The file, or one that is open.
        upright: Whether to apply the EXIF orientation.
        least_side: JPEG files are decoded at 1/2, 1/4 or 1/8 of their size (the last steps of decoding left out) while
            both sides keep this many pixels: several times faster for large photographs, and other pixels than those
            of a full image made smaller. None decodes in full.
        max_pixels: Refuse larger images before they are decoded. None leaves it to Pillow's own limit.
        formats: Pillow's names of the formats that are tried. None tries all.

    Raises:
        OSError: The file cannot be read or decoded.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise OSError(f"{image.width} x {image.height} pixels are more than {max_pixels / 1e6:g} million")
            if least_side is not None:
                image.draft(None, (least_side, least_side))
            image.load()
            rgb = _to_rgb(_upright(image) if upright else image)
            if _first_of_several(image):
                rgb.info["first_of_several"] = True
            return rgb
    except OSError:
        raise
    except Exception as error:  # decoders raise all kinds: SyntaxError, struct.error, DecompressionBombError
        raise OSError(f"{type(error).__name__}: {error}") from error


def _first_of_several(image: Image.Image) -> bool:
    with suppress(Exception):  # damage behind a good picture
        return image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photograph with its previews
    return False


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged metadata around a good picture
        ImageOps.exif_transpose(image, in_place=True)  # without the copy that it makes otherwise
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        values = np.asarray(image).astype(np.float64)
        if image.mode != "F" and (image.mode != "I" or values.max() > 255):
            values = values / 257  # 16 bits to 8; mode I may hold either
        elif image.mode == "F" and values.max() <= 1:
            values = values * 255
        image = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def unreadable(paths: Sequence[str], whole: bool) -> dict[str, str]:
    """The files among `paths` that are no readable image, each with the reason, in the order of `paths`.

    Args:
        paths: The files.
        whole: Decode each file. Otherwise only its header and its last bytes are read, and the rest when those are odd:
            some thirty times quicker, and blind only to damage in the middle of a file.
    """
    with quiet(), ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        reasons = pool.map(lambda path: _problem_of(path, whole), paths)
        return {path: reason for path, reason in zip(paths, reasons) if reason}


def _problem_of(path: str, whole: bool) -> str | None:
    try:
        status = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    return _problem(path, status.st_size, status.st_mtime_ns, whole)


@functools.lru_cache(maxsize=1 << 20)
def _problem(path: str, size: int, mtime_ns: int, whole: bool) -> str | None:
    """Why the file is no readable image; remembered for as long as its size and time of change stay the same."""
    if size == 0:
        return "the file is empty"
    try:
        if not whole:
            with Image.open(path) as image:
                ending = _ENDINGS.get(image.format or "")
            with open(path, "rb") as file:
                file.seek(max(0, size - 64))
                whole = ending is None or ending not in file.read()
        if whole:
            load_rgb(path)
    except Image.UnidentifiedImageError:
        return "not an image file"
    except Exception as error:
        return str(error) or type(error).__name__
    return None
