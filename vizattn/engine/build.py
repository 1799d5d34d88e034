"""From a resolved configuration to the data of a run: splits, transforms, loaders, and the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from vizattn.engine.decoded import decoded
from vizattn.engine.kinds import kind_of
from vizattn.engine.runner import rank_and_world
from vizattn.errors import VizattnError, unknown

__all__ = ["Data", "build_data", "check_classes", "choose_device", "make_loader", "set_transforms"]

_LOADING = ("name", "root", "batch_size", "num_workers", "augment", "crop_size", "short_side", "resize", "in_memory")


@dataclass
class Data:
    """The splits of a run's data set."""

    splits: dict[str, Any]
    class_names: list[str]


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default CUDA when there is one (this process's own under torchrun), else the CPU.

    Raises:
        VizattnError: There is no such device, or it cannot compute.
    """
    import os

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, ["cpu", "cuda", "cuda:0"]) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise VizattnError("Device cuda was asked for, but this machine or this build of torch has none.")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        choices = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise VizattnError(f"The device {name!r} cannot compute on this machine. Choose {choices}.") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _data_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe's data section that are the data set's own."""
    return {key: value for key, value in data.items() if key not in _LOADING}


def build_data(data: Mapping[str, Any], splits: Sequence[str] | None = None) -> Data:
    """`splits`, by default train and what else there is, without a transform yet: the model says which.

    Raises:
        VizattnError: A split that the data does not have, and what its data set raises.
    """
    from vizattn.data import available_splits, build_dataset

    options = _data_options(data)
    if splits is None:
        splits = [*dict.fromkeys(["train", *available_splits(data["name"], root=data["root"], **options)])]
    built: dict[str, Any] = {
        split: build_dataset(data["name"], split, root=data["root"], **options) for split in splits
    }
    return Data(built, list(built[splits[0]].class_names))


def set_transforms(data: Data, preprocessing: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Give each split its transform; with `data.in_memory` those to train and select on are decoded once."""
    for split, dataset in data.splits.items():
        dataset.transform = kind_of(config).build_transform(preprocessing, config["data"], split == "train")
        if config["data"].get("in_memory") and split != "test":
            data.splits[split] = decoded(dataset)


def make_loader(
    dataset: Any, config: Mapping[str, Any], device: torch.device, *, train: bool, num_workers: int | None = None
) -> DataLoader:
    """This process's loader; `data.batch_size` is that of one process."""
    from vizattn.data.loader import build_loader

    rank, world_size = rank_and_world()
    return build_loader(
        dataset,
        config["data"]["batch_size"] if train else kind_of(config).eval_batch_size(config["data"]),
        train=train,
        seed=config["seed"],
        num_workers=config["data"]["num_workers"] if num_workers is None else num_workers,
        rank=rank,
        world_size=world_size,
        pin_memory=device.type == "cuda",
    )


def check_classes(given: list[str], expected: list[str], what: str) -> None:
    """See that a data set has the classes of a trained head.

    Raises:
        VizattnError: It has others; the message names the first that differ.
    """
    if given == expected:
        return
    if len(given) != len(expected):
        raise VizattnError(f"The data has {len(given)} classes, but the head of {what} has {len(expected)}.")
    place = next(i for i, (a, b) in enumerate(zip(given, expected)) if a != b)
    raise VizattnError(
        f"The classes of the data are not those of {what}: class {place} is {given[place]!r} in the data "
        f"and {expected[place]!r} in the head."
    )
