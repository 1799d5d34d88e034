"""Where the images of VTAB-1k's tasks come from, as far as torchvision has them; and what is needed for the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vizattn.data.images import find_images

__all__ = ["NEEDED", "SOURCES", "Pool", "Pools"]


class Pool(NamedTuple):
    """Images to draw from: their labels, and each image by its place, as a file or decoded."""

    labels: list[int]
    image: Callable[[int], Path | Image.Image]


class Pools(NamedTuple):
    """Pools "train" and "test", also "val" where the source has one; or "all", where it has no splits."""

    pools: dict[str, Pool]
    class_names: list[str]


NEEDED = {
    "resisc45": "NWPU-RESISC45: 31,500 images of 45 classes, by its authors' site (Cheng, Han and Lu, 2017)",
    "diabetic_retinopathy": "the images of Kaggle's competition Diabetic Retinopathy Detection, which asks for an "
    "account and its rules to be accepted; VTAB takes them scaled to a height of 300 pixels",
    "dmlab": "frames of DeepMind Lab with the labels that VTAB published for them, by TensorFlow Datasets",
    "smallnorb_azi": "small NORB by its authors' site (LeCun, Huang and Bottou, 2004): 96 x 96 grey, one camera",
    "smallnorb_ele": "small NORB by its authors' site (LeCun, Huang and Bottou, 2004): 96 x 96 grey, one camera",
}
"""Tasks that can be neither drawn nor had by torchvision, and what they are made of."""


def _files(paths: Sequence[Path], labels: Sequence[int]) -> Pool:
    return Pool(list(labels), lambda place: paths[place])


def _decoded(dataset: Any, labels: Sequence[int]) -> Pool:
    return Pool([int(label) for label in labels], lambda place: dataset[place][0])


def _cifar(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import CIFAR100

    train, test = (CIFAR100(folder, train=part, download=download) for part in (True, False))
    return Pools({"train": _decoded(train, train.targets), "test": _decoded(test, test.targets)}, train.classes)


def _caltech101(folder: Path, download: bool) -> Pools:
    """With the background class, which torchvision's data set leaves out; thirty images a class to draw from."""
    from torchvision.datasets import Caltech101

    from vizattn.data.folder import divide

    if download:
        Caltech101(folder, download=True)
    root = folder / "caltech101" / "101_ObjectCategories"
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    parts: dict[str, tuple[list[Path], list[int]]] = {"train": ([], []), "test": ([], [])}
    for label, name in enumerate(names):
        files = find_images(str(root / name))
        rest, _, first = divide(files, 0.0, min(30, len(files) - 1) / len(files), seed=0)
        for part, chosen in (("train", first), ("test", rest)):
            parts[part][0].extend(root / name / file for file in chosen)
            parts[part][1].extend([label] * len(chosen))
    return Pools({part: _files(*content) for part, content in parts.items()}, names)


def _dtd(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import DTD

    found = {part: DTD(folder, split=part, download=download) for part in ("train", "val", "test")}
    pools = {part: _files(data._image_files, data._labels) for part, data in found.items()}
    return Pools(pools, found["train"].classes)


def _flowers(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import Flowers102

    found = {part: Flowers102(folder, split=part, download=download) for part in ("train", "val", "test")}
    pools = {part: _files(data._image_files, data._labels) for part, data in found.items()}
    return Pools(pools, [str(label) for label in range(102)])


def _pets(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import OxfordIIITPet

    found = {part: OxfordIIITPet(folder, split=part, download=download) for part in ("trainval", "test")}
    pools = {part.removesuffix("val"): _files(data._images, data._labels) for part, data in found.items()}
    return Pools(pools, found["test"].classes)


def _svhn(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import SVHN

    found = {part: SVHN(folder, split=part, download=download) for part in ("train", "test")}
    pools = {part: _decoded(data, data.labels) for part, data in found.items()}
    return Pools(pools, [str(digit) for digit in range(10)])


def _sun397(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import SUN397

    data = SUN397(folder, download=download)
    return Pools({"all": _files(data._image_files, data._labels)}, data.classes)


def _camelyon(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import PCAM

    found = {part: PCAM(folder, split=part, download=download) for part in ("train", "val", "test")}
    pools = {}
    for part, data in found.items():
        with data.h5py.File(data._base_folder / data._FILES[part]["targets"][0]) as file:
            pools[part] = _decoded(data, file["y"][:, 0, 0, 0])
    return Pools(pools, ["no tumour", "tumour"])


def _eurosat(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import EuroSAT

    data = EuroSAT(folder, download=download)
    paths, labels = zip(*data.samples)
    return Pools({"all": _files([Path(path) for path in paths], labels)}, data.classes)


def _clevr(label: Callable[[list[dict[str, Any]]], int], names: list[str]) -> Callable[[Path, bool], Pools]:
    def pools(folder: Path, download: bool) -> Pools:
        """CLEVR's validation images are the test images, as its own have no labels."""
        from torchvision.datasets import CLEVRClassification

        if download:
            CLEVRClassification(folder, download=True)
        root, found = folder / "clevr" / "CLEVR_v1.0", {}
        for part, split in (("train", "train"), ("test", "val")):
            scenes = json.loads((root / "scenes" / f"CLEVR_{split}_scenes.json").read_text(encoding="utf-8"))["scenes"]
            paths = [root / "images" / split / scene["image_filename"] for scene in scenes]
            found[part] = _files(paths, [label(scene["objects"]) for scene in scenes])
        return Pools(found, names)

    return pools


def _between(value: float, thresholds: Sequence[float]) -> int:
    return sum(value >= threshold for threshold in thresholds)


def _kitti(folder: Path, download: bool) -> Pools:
    from torchvision.datasets import Kitti

    data = Kitti(folder, train=True, download=download)

    def label(place: int) -> int:
        objects = data._parse_target(place)
        depths = [float(entry["location"][2]) for entry in objects if entry["type"] in ("Car", "Van", "Truck")]
        return _between(min(depths), (8.0, 20.0)) if depths else 3

    labels = [label(place) for place in range(len(data))]
    pool = _files([Path(path) for path in data.images], labels)
    return Pools({"all": pool}, ["below 8 m", "8 to 20 m", "20 m and more", "no vehicle"])


SOURCES: dict[str, Callable[[Path, bool], Pools]] = {
    "cifar": _cifar,
    "caltech101": _caltech101,
    "dtd": _dtd,
    "oxford_flowers102": _flowers,
    "oxford_iiit_pet": _pets,
    "svhn": _svhn,
    "sun397": _sun397,
    "patch_camelyon": _camelyon,
    "eurosat": _eurosat,
    "clevr_count": _clevr(lambda objects: len(objects) - 3, [str(count) for count in range(3, 11)]),
    "clevr_dist": _clevr(
        lambda objects: _between(min(entry["pixel_coords"][2] for entry in objects), (8.0, 8.5, 9.0, 9.5, 10.0)),
        ["below 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "10 and more"],
    ),
    "kitti": _kitti,
}
"""Tasks whose images torchvision downloads, or finds in a folder where it did."""
