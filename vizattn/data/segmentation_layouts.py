"""Where the images and the masks of a segmentation data set lie: four layouts of folders, as pairs by split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vizattn.data.folder import SPLIT_ALIASES, check_fractions, divide, nearest_tree, tree
from vizattn.data.images import find_images
from vizattn.errors import VizattnError, unknown

__all__ = ["LAYOUTS", "Found", "Pair", "find_pairs"]

LAYOUTS = ("folders", "ade20k", "voc", "cityscapes")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
_MASK_FOLDERS = ("masks", "mask", "annotations", "annotation", "labels", "label", "SegmentationClass", "gt")
_ALIASES = {**SPLIT_ALIASES, "train": ("train", "training")}
_MASK_ENDINGS = ("", "_mask", "_masks", "_seg", "_segmentation", "_label", "_labels", "_gt", "-mask", ".mask")
_EXPECTED = """Expected images and masks of the same names,
  {root}/images/<name>.jpg
  {root}/masks/<name>.png        (or annotations/, labels/)
split automatically, or split by you, as images/train/ and masks/train/ or as train/images/ and train/masks/; or the
layouts of Pascal VOC (JPEGImages/, SegmentationClass/, ImageSets/Segmentation/train.txt), of ADE20K (images/training/,
annotations/training/) or of Cityscapes (leftImg8bit/train/, gtFine/train/).
"""


class Pair(NamedTuple):
    """An image and its mask: the name they share, and two paths."""

    name: str
    image: str
    mask: str


@dataclass
class Found:
    """The pairs of each split, and what has no partner.

    Attributes:
        layout: One of `LAYOUTS`.
        root: The folder that has the layout: the given one, or one inside.
        splits: Pairs by split, each in the order of names.
        without_mask: Images (or names in a list of images) by split.
        without_image: Masks.
    """

    layout: str
    root: str
    splits: dict[str, list[Pair]]
    without_mask: dict[str, list[str]] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)


def find_pairs(
    root: str | os.PathLike[str],
    layout: str = "auto",
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Found:
    """Finds images with their masks; names are compared without suffix, and a mask's may end in "_mask" and the like.

    Without split folders or lists the pairs are divided into train, val and test; where there is a train but no val
    split, val is split off. Where a pair goes depends on the seed and its name alone.

    Args:
        root: The folder.
        layout: One of `LAYOUTS`, or "auto".
        val_fraction: Share of the pairs for validation where that is split automatically.
        test_fraction: The same for the test split, where there are no splits at all.
        seed: Of the automatic split.

    Raises:
        VizattnError: Missing folder, unknown layout or split, no pairs.
    """
    root = os.path.abspath(root)
    check_fractions(val_fraction, test_fraction)
    if layout not in ("auto", *LAYOUTS):
        raise unknown("layout", layout, ("auto", *LAYOUTS))
    if not os.path.isdir(root):
        raise VizattnError(f"There is no folder {root}.\n{_EXPECTED.format(root=root)}{nearest_tree(root)}")
    for base in (root, *(os.path.join(root, *inner) for inner in (("VOC2012",), ("VOCdevkit", "VOC2012")))):
        chosen = _layout_of(base) if layout == "auto" else layout
        found = _FINDERS[chosen](Path(base)) if chosen else None
        if found is not None and any(found.splits.values()):
            break
    else:
        what = "images with masks" if layout == "auto" else f"images with masks in the layout {layout!r}"
        raise VizattnError(f"There are no {what} in {root}.\n{_EXPECTED.format(root=root)}{tree(root)}")
    _divide(found, val_fraction, test_fraction, seed)
    return found


def _layout_of(base: str) -> str | None:
    def has(*names: str) -> bool:
        return all(os.path.isdir(os.path.join(base, name)) for name in names)

    if has("JPEGImages", "SegmentationClass"):
        return "voc"
    if has("leftImg8bit", "gtFine"):
        return "cityscapes"
    if has("images/training", "annotations/training"):
        return "ade20k"
    return "folders" if os.path.isdir(base) else None


def _divide(found: Found, val_fraction: float, test_fraction: float, seed: int) -> None:
    """Makes the splits that are missing, in the order train, val, test; leaves out empty ones."""
    splits = found.splits
    if "all" in splits or ("train" in splits and "val" not in splits):
        source, kept = ("all", test_fraction) if "all" in splits else ("train", 0.0)
        by_name = {pair.name: pair for pair in splits.pop(source)}
        parts = divide(list(by_name), val_fraction, kept, seed)
        for split, names in zip(("train", "val", "test"), parts):
            splits.setdefault(split, [by_name[name] for name in names])
        found.without_mask |= {"train": found.without_mask.pop(source, [])}
    found.splits = {split: splits[split] for split in ("train", "val", "test") if splits.get(split)}


def _folders(base: Path, layout: str = "folders") -> Found | None:
    found = Found(layout, str(base), {})
    images, masks = _first(base, _IMAGE_FOLDERS), _first(base, _MASK_FOLDERS)
    places: dict[str, tuple[Path, Path]] = {}
    if images and masks:
        below = {split: (_first(images, names), _first(masks, names)) for split, names in _ALIASES.items()}
        places = {split: (a, b) for split, (a, b) in below.items() if a and b} or {"all": (images, masks)}
    else:
        for split, names in _ALIASES.items():
            for name in names:
                images, masks = _first(base / name, _IMAGE_FOLDERS), _first(base / name, _MASK_FOLDERS)
                if images and masks:
                    places.setdefault(split, (images, masks))
    for split, (image_folder, mask_folder) in places.items():
        _match(found, split, _by_stem(image_folder), _by_stem(mask_folder), _MASK_ENDINGS)
    return found


def _ade20k(base: Path) -> Found | None:
    return _folders(base, "ade20k") if _layout_of(str(base)) == "ade20k" else None


def _voc(base: Path) -> Found | None:
    found = Found("voc", str(base), {})
    images, masks = _by_stem(base / "JPEGImages"), _by_stem(base / "SegmentationClass")
    lists = {split: base / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("train", "val", "test")}
    lists = {split: path for split, path in lists.items() if path.is_file()}
    if "train" not in lists and (both := base / "ImageSets" / "Segmentation" / "trainval.txt").is_file():
        lists = {"train": both, **{split: path for split, path in lists.items() if split == "test"}}
    for split, path in lists.items():
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        listed = {name: images.get(name, str(base / "JPEGImages" / f"{name}.jpg")) for name in dict.fromkeys(names)}
        _match(found, split, listed, {name: masks[name] for name in listed if name in masks}, ("",))
    if not lists:
        _match(found, "all", images, masks, ("",))
        # Most of VOC's images have boxes only.
        found.without_mask.clear()
    elif not found.splits.get("test"):
        found.without_mask.pop("test", None)  # VOC keeps the masks of test to itself
    return found


def _cityscapes(base: Path) -> Found | None:
    found = Found("cityscapes", str(base), {})
    for split in ("train", "val"):  # the masks of test are not public: the files there ignore all
        images = _by_stem(base / "leftImg8bit" / split, "_leftImg8bit")
        masks = _by_stem(base / "gtFine" / split)
        masks = {name: path for name, path in masks.items() if name.endswith(("_labelTrainIds", "_labelIds"))}
        _match(found, split, images, masks, ("_gtFine_labelTrainIds", "_gtFine_labelIds"))
    found.without_image.clear()  # labelIds beside labelTrainIds
    return found


_FINDERS = {"folders": _folders, "ade20k": _ade20k, "voc": _voc, "cityscapes": _cityscapes}


def _match(
    found: Found, split: str, images: Mapping[str, str], masks: Mapping[str, str], endings: Iterable[str]
) -> None:
    """Adds what belongs together to `split`: a mask is named as its image, with one of the endings, the first first."""
    pairs, used = [], set()
    for name, image in sorted(images.items()):
        ending = next((ending for ending in endings if name + ending in masks), None)
        if ending is None:
            found.without_mask.setdefault(split, []).append(image)
        else:
            pairs.append(Pair(name, image, masks[name + ending]))
            used.add(name + ending)
    if pairs:
        found.splits[split] = pairs
    found.without_image += [path for name, path in masks.items() if name not in used]


def _by_stem(folder: Path, ending: str = "") -> dict[str, str]:
    """Paths of the images below `folder` by their names relative to it, without suffix and `ending`."""
    names = ((os.path.splitext(name)[0], name) for name in find_images(str(folder)))
    return {stem.removesuffix(ending): str(folder / name) for stem, name in names if stem.endswith(ending)}


def _first(parent: Path, names: Iterable[str]) -> Path | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)
