"""Images in one folder a class, with split folders above the class folders or with an automatic split."""

from __future__ import annotations

import bisect
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from vizattn.data.images import find_images, hidden, load_rgb, unreadable
from vizattn.errors import VizattnError, unknown

__all__ = ["ImageFolder", "folder_splits", "has_split_folders"]

SPLIT_ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_EXPECTED = """Expected one folder a class, split automatically,
  {root}/<class>/<image>.jpg
or split by you,
  {root}/train/<class>/<image>.jpg
  {root}/val/<class>/<image>.jpg
  {root}/test/<class>/<image>.jpg
"""
_SPLIT_NAMES = {name for names in SPLIT_ALIASES.values() for name in names}
_SHOWN = 12  # lines of a tree, and names in a message


class ImageFolder(Dataset):
    """One split of a folder of images. Items are PIL RGB images (see `load_rgb`) through `transform`.

    With `root/train/<class>/` the split folders are used ("valid" and "validation" are taken for "val"); where there is
    no val folder, it is split off train. With `root/<class>/` all three splits are made automatically: each class on
    its own, in an order that hashes the seed and the file's name, so that neither the file system nor the other files
    change where an image goes. A val or test split without any image is left out; the split "all" is all images. Class
    names are the sorted folder names; hidden files are ignored.

    Unreadable images are looked for at construction: the val and test splits are decoded whole, the train split by
    header and end of file. `skipped` lists what was left out, so the length is known before the first batch and is the
    same on each rank. Damage that only shows in the middle of training gives another image of the class instead; in
    evaluation it is an error, since there each image counts.

    Args:
        root: The folder.
        split: "train", "val" or "test"; with `root/<class>/` also "all".
        transform: Applied to each image.
        val_fraction: Share of each class for validation where that is split automatically.
        test_fraction: The same for the test split; used with `root/<class>/` only.
        seed: Of the automatic split.
        on_error: "skip" (warn, naming each unreadable image, and go on without it) or "stop" (raise).
        least_side: Decode JPEG files at a fraction of their size while both sides keep this many pixels; faster, but
            other pixels (see `load_rgb`). By default they are decoded in full.

    Attributes:
        class_names: Names of the classes; labels are positions in it.
        paths: Files, absolute, ordered by class and name.
        labels: Class of each file.
        skipped: Unreadable files that were left out, each with the reason.
        identity: Hash over the classes and each file's name, size and time of change.

    Raises:
        VizattnError: Missing or empty folder or split, classes that differ between splits, an unknown or senseless
            option, an unreadable image with `on_error="stop"`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[[Any], Any] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        on_error: str = "skip",
        least_side: int | None = None,
    ) -> None:
        if on_error not in ("skip", "stop"):
            raise unknown("value of on_error", on_error, ("skip", "stop"))
        if least_side is not None and least_side < 1:
            raise VizattnError(f"least_side must be at least 1 pixel, not {least_side}.")
        self.root = os.path.abspath(root)
        self.split = split
        self.transform = transform
        self.on_error = on_error
        self.least_side = least_side
        splits = _splits(self.root, val_fraction, test_fraction, seed)
        if split == "all" and not has_split_folders(self.root):
            splits["all"] = _classes(self.root, "")
        if split not in splits:
            raise VizattnError(f"There is no {split} split in {self.root}; it has {', '.join(splits)}.")
        self.class_names = list(splits[split])
        found = [(name, label) for label, names in enumerate(splits[split].values()) for name in names]
        self.skipped = self._check([name for name, _ in found])
        found = [(name, label) for name, label in found if os.path.join(self.root, name) not in self.skipped]
        if not found:
            shares = f" with val_fraction {val_fraction} and test_fraction {test_fraction}"
            raise VizattnError(f"The {split} split of {self.root} has no readable image{shares}.")
        self.paths = [os.path.join(self.root, name) for name, _ in found]
        self.labels = [label for _, label in found]
        self.identity = self._identity([name for name, _ in found])
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._load(index)
        return image if self.transform is None else self.transform(image), self.labels[index]

    def _load(self, index: int) -> Image.Image:
        index = range(len(self))[index]
        label = self.labels[index]
        first, last = bisect.bisect_left(self.labels, label), bisect.bisect_right(self.labels, label)
        for other in (*range(index, last), *range(first, index)):
            path = self.paths[other]
            try:
                return load_rgb(path, least_side=self.least_side)
            except OSError as error:
                if self.on_error == "stop" or self.split != "train":
                    raise VizattnError(f"Cannot read the image {path}: {error}") from None
                if path not in self._warned:
                    self._warned.add(path)
                    warnings.warn(f"Another image of its class stands in for {path}: {error}", stacklevel=2)
        raise VizattnError(f"No image of class {self.class_names[label]!r} can be read any more in {self.root}.")

    def _check(self, names: list[str]) -> dict[str, str]:
        bad = unreadable([os.path.join(self.root, name) for name in names], whole=self.split != "train")
        if bad and self.on_error == "stop":
            reasons = listed(f"{path}: {reason}" for path, reason in bad.items())
            raise VizattnError(
                f"{len(bad)} of {len(names)} images of the {self.split} split cannot be read:\n{reasons}\n"
                'Repair or remove them, or leave them out with data.on_error="skip".'
            )
        for path, reason in bad.items():
            warnings.warn(f"Left out of the {self.split} split, cannot be read: {path}: {reason}", stacklevel=3)
        return bad

    def _identity(self, names: list[str]) -> str:
        digest = hashlib.sha256(repr(self.class_names).encode())
        if self.least_side is not None:
            digest.update(repr(self.least_side).encode())  # other pixels
        for name, path, label in zip(names, self.paths, self.labels):
            status = os.stat(path)
            digest.update(repr((name, label, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()


def folder_splits(
    root: str | os.PathLike[str], val_fraction: float = 0.1, test_fraction: float = 0.2, seed: int = 0
) -> list[str]:
    """The names of the splits that `ImageFolder` can give, beside "all": "train" first, if it is there.

    Raises:
        VizattnError: As `ImageFolder`.
    """
    return list(_splits(os.path.abspath(root), val_fraction, test_fraction, seed))


def has_split_folders(root: str | os.PathLike[str]) -> bool:
    """Whether `root` has split folders with class folders inside, and not class folders themselves."""
    folders = _split_folders(os.path.abspath(root))
    return "train" in folders or (bool(folders) and _SPLIT_NAMES.issuperset(_subfolders(os.fspath(root))))


def _splits(root: str, val_fraction: float, test_fraction: float, seed: int) -> dict[str, dict[str, list[str]]]:
    """Split to class to file names relative to `root`."""
    check_fractions(val_fraction, test_fraction)
    if not os.path.isdir(root):
        raise VizattnError(f"There is no folder {root}.\n{_EXPECTED.format(root=root)}{nearest_tree(root)}")
    if not has_split_folders(root):
        classes = _classes(root, "")
        _demand_images(root, "", classes)
        parts = {name: divide(files, val_fraction, test_fraction, seed) for name, files in classes.items()}
        return _nonempty(parts, ("train", "val", "test"))

    folders = _split_folders(root)
    found = {split: _classes(root, name) for split, name in folders.items()}
    first = next(iter(found))
    _demand_images(root, folders[first], found[first])
    for split, classes in found.items():
        _demand_same_classes(root, split, classes, first, found[first])
    if "train" in found and "val" not in found:
        parts = {name: divide(files, val_fraction, 0.0, seed) for name, files in found["train"].items()}
        found |= _nonempty(parts, ("train", "val"))
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Sees that both are shares and leave something to train on."""
    for option, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise VizattnError(f"{option} is a share of the images, at least 0 and below 1, not {value}.")
    if val_fraction + test_fraction >= 1:
        raise VizattnError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on.")


def _split_folders(root: str) -> dict[str, str]:
    """Split to the folder of that name which has folders inside."""
    found = {
        split: next((name for name in names if _subfolders(os.path.join(root, name))), None)
        for split, names in SPLIT_ALIASES.items()
    }
    return {split: name for split, name in found.items() if name}


def _nonempty(parts: dict[str, tuple[list[str], ...]], splits: tuple[str, ...]) -> dict[str, dict[str, list[str]]]:
    divided = {split: {name: part[i] for name, part in parts.items()} for i, split in enumerate(splits)}
    return {split: classes for split, classes in divided.items() if any(classes.values())}


def divide(files: list[str], val_fraction: float, test_fraction: float, seed: int) -> tuple[list[str], ...]:
    """Train, val and test part of one class; a part with a share gets at least one image while there are enough."""
    order = sorted(files, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest())
    count = len(order)
    test = min(max(round(count * test_fraction), int(test_fraction > 0 and count > 2)), count - 1)
    val = max(round(count * val_fraction), int(val_fraction > 0 and count > 1))
    val = min(val, count - test - 1)
    return sorted(order[test + val :]), sorted(order[test : test + val]), sorted(order[:test])


def _classes(root: str, folder: str) -> dict[str, list[str]]:
    parent = os.path.join(root, folder) if folder else root
    prefix = f"{folder}/" if folder else ""
    return {
        name: [f"{prefix}{name}/{image}" for image in find_images(os.path.join(parent, name))]
        for name in _subfolders(parent)
    }


def _subfolders(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not hidden(entry.name))


def _demand_images(root: str, folder: str | None, classes: dict[str, list[str]]) -> None:
    where = os.path.join(root, folder) if folder else root
    empty = [name for name, files in classes.items() if not files]
    if classes and not folder and _SPLIT_NAMES.issuperset(classes):
        problem = f"There are no class folders in {_quoted(list(classes))} of {where}."
    elif not classes:
        problem = f"{where} has no class folders."
    elif len(empty) == len(classes):
        problem = f"There are no images in the class folders of {where}."
    elif empty:
        problem = f"There are no images for {_quoted(empty)} in {where}. Add some, or remove the empty folders."
    else:
        return
    raise VizattnError(f"{problem}\n{_EXPECTED.format(root=root)}{tree(root)}")


def _demand_same_classes(
    root: str, split: str, classes: dict[str, list[str]], first: str, expected: dict[str, list[str]]
) -> None:
    extra, missing = [n for n in classes if n not in expected], [n for n in expected if n not in classes]
    if extra or missing:
        problems = [f"has {_quoted(extra)}, which {first} lacks"] if extra else []
        problems += [f"lacks {_quoted(missing)}, which {first} has"] if missing else []
        raise VizattnError(
            f"The classes of the {split} folder must be those of {first}: it {' and '.join(problems)}. A class without "
            f"{split} images is an empty folder.\n{tree(root)}"
        )
    if not any(classes.values()):
        raise VizattnError(f"There are no images in the {split} folder.\n{_EXPECTED.format(root=root)}{tree(root)}")


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def listed(lines: Iterable[str], indent: str = "  ") -> str:
    """The first lines, indented, and how many more there are."""
    lines = list(lines)
    shown = lines[:_SHOWN] + ([f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    return "\n".join(indent + line for line in shown)


def nearest_tree(path: str) -> str:
    """The tree of the lowest folder above a missing path that does exist."""
    path = os.path.abspath(path)  # the parent of a bare name is not ""
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return tree(path)


def tree(root: str) -> str:
    """What is in a folder, two levels deep, shortened."""
    lines = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not entry.is_dir():
            lines.append(entry.name)
            continue
        try:
            inside = sorted(os.listdir(entry.path))
        except OSError:
            inside = ["(cannot be read)"]
        names = ", ".join(inside[:4]) + (f", ... ({len(inside)} in all)" if len(inside) > 4 else "")
        lines.append(f"{entry.name}/  {names or '(empty)'}")
    return f"Found in {root}:\n{listed(lines) if lines else '  (nothing)'}"
