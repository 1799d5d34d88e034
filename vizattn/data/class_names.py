"""Names and colours of the classes of masks: told by the user, by a file, or known from the data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vizattn.data.masks import IGNORE_INDEX, distinct, palette_of, to_classes, voc_palette
from vizattn.data.segmentation_layouts import Found
from vizattn.errors import VizattnError
from vizattn.files import read_text

__all__ = ["NAME_FILES", "find_class_names", "find_palette", "names_in"]

_LARGEST = 100_000
"""Index of a class: all below have a name, too."""

NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")

VOC = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
VOC += ["diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]

CITYSCAPES = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"]
CITYSCAPES += ["terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]

CITYSCAPES_PALETTE = [(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)]
CITYSCAPES_PALETTE += [(250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)]
CITYSCAPES_PALETTE += [(255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)]

_ADE20K = """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door; table;
mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field; armchair; seat;
fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest of drawers; counter;
sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table; pillow;
screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop;
stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel; light; truck; tower;
chandelier; awning; streetlight; booth; television receiver; airplane; dirt track; apparel; pole; land; bannister;
escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer; plaything;
swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step; tank; trade name;
microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic light; tray;
ashcan; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator; glass; clock; flag
"""
ADE20K = [name.strip() for name in _ADE20K.split(";")]


def find_class_names(found: Found, reduce_zero_label: bool, given: Sequence[str] | None = None) -> list[str]:
    """The names of the classes, see `SegmentationFolder`; "class 0", "class 1", ... where nothing tells them.

    Raises:
        VizattnError: Names that occur twice, too many, or none and only one class in the masks.
    """
    names = list(given) if given is not None else _names_in_file(found.root) or _known_names(found, reduce_zero_label)
    if names is None:
        masks = [pair.mask for pairs in found.splits.values() for pair in pairs]
        labels = np.array(sorted(distinct(masks)), dtype=np.int64)
        classes = to_classes(labels, reduce_zero_label=reduce_zero_label)
        count = int(classes[classes != IGNORE_INDEX].max(initial=-1)) + 1
        if count < 2:
            raise VizattnError(
                f"The masks in {found.root} hold only the labels {', '.join(map(str, labels)) or '(none)'}: fewer than "
                f"two classes, as {IGNORE_INDEX} is ignored. Number the classes 0, 1, ...; a mask of one "
                "object is 0 and 1."
            )
        names = [f"class {index}" for index in range(count)]
    if len(names) > IGNORE_INDEX:
        raise VizattnError(f"There are {len(names)} classes in {found.root}; at most {IGNORE_INDEX} fit into masks.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise VizattnError(f"Class names must differ; {', '.join(map(repr, twice))} occurs twice.")
    if len(names) < 2:
        raise VizattnError(f"Segmentation needs two classes or more, not {names}.")
    return names


def _names_in_file(root: str) -> list[str] | None:
    path = next((Path(root) / name for name in NAME_FILES if (Path(root) / name).is_file()), None)
    return None if path is None else names_in(path)


def names_in(path: Path) -> list[str]:
    """Class names from a file: one a line, or "index: name"; indices that are left out are "class n".

    Raises:
        VizattnError: The file is no such list.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except OSError as error:
        raise VizattnError(f"Cannot read the class names in {path}: {error.strerror or error}") from None
    except ValueError:
        raise VizattnError(f"{path} is no list of class names in UTF-8.") from None
    numbered = [re.fullmatch(r"(\d{1,9})\s*:\s*(.+)", line) for line in lines]
    if not lines or not all(numbered):
        if any(numbered) or not lines:
            raise VizattnError(f'{path} must have one class name a line, or "index: name" on each line.')
        return lines
    by_index = {int(match[1]): match[2] for match in numbered if match and int(match[1]) != IGNORE_INDEX}
    if (largest := max(by_index, default=0)) > _LARGEST:
        raise VizattnError(f"{path} names class {largest}; the largest may be {_LARGEST}.")
    return [by_index.get(index, f"class {index}") for index in range(max(by_index, default=-1) + 1)]


def _known_names(found: Found, reduce_zero_label: bool) -> list[str] | None:
    """Of the data set that the names of the files belong to; a layout alone may hold anything."""
    first = next(pair for pairs in found.splits.values() for pair in pairs).name
    if found.layout == "cityscapes":
        return list(CITYSCAPES)
    if found.layout == "voc" and re.fullmatch(r"\d{4}_\d{6}", first):
        return list(VOC)
    if found.layout == "ade20k" and first.startswith("ADE_"):
        return ADE20K if reduce_zero_label else ["other", *ADE20K]
    return None


def find_palette(layout: str, mask: str, classes: int, reduce_zero_label: bool) -> list[tuple[int, int, int]]:
    """A colour (red, green, blue) for each class: those of a mask that has a palette, or Pascal VOC's."""
    if layout == "cityscapes" and classes == len(CITYSCAPES_PALETTE):
        return list(CITYSCAPES_PALETTE)
    skip = int(reduce_zero_label)
    own = palette_of(mask, classes + skip)
    return (own or voc_palette(classes + skip))[skip:]
