"""From a resolved configuration to the objects of a run: model, data, loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vizattn.engine.runner import rank_and_world
from vizattn.errors import VizattnError, unknown

__all__ = ["Data", "build_data", "build_model", "check_classes", "choose_device", "make_loader", "set_transforms"]

_LOADING = ("name", "root", "batch_size", "num_workers", "augment")


@dataclass
class Data:
    """The splits of a run's data set."""

    splits: dict[str, Any]
    class_names: list[str]


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default CUDA when there is one (this process's own under torchrun), else the CPU."""
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
        torch.cuda.set_device(device)
    return device


def _data_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe's data section that are the data set's own."""
    return {key: value for key, value in data.items() if key not in _LOADING}


def build_data(data: Mapping[str, Any]) -> Data:
    """Every split the data set has, without a transform yet: that depends on the model, which needs the classes."""
    from vizattn.data import available_splits, build_dataset

    options = _data_options(data)
    splits: dict[str, Any] = {
        split: build_dataset(data["name"], split, root=data["root"], **options)
        for split in available_splits(data["name"], root=data["root"], **options)
    }
    return Data(splits, list(splits["train"].class_names))


def set_transforms(data: Data, preprocessing: Mapping[str, Any], augment: str) -> None:
    """Give each split its transform: `augment` is for training."""
    from vizattn.data import build_transforms

    for split, dataset in data.splits.items():
        dataset.transform = build_transforms(dict(preprocessing), train=split == "train", augment=augment)


def make_loader(
    dataset: Any, config: Mapping[str, Any], device: torch.device, *, train: bool, num_workers: int | None = None
) -> DataLoader:
    """This process's loader; `data.batch_size` is that of one process."""
    from vizattn.data.loader import build_loader

    rank, world_size = rank_and_world()
    return build_loader(
        dataset,
        config["data"]["batch_size"],
        train=train,
        seed=config["seed"],
        num_workers=config["data"]["num_workers"] if num_workers is None else num_workers,
        rank=rank,
        world_size=world_size,
        pin_memory=device.type == "cuda",
    )


def build_model(config: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The recipe's backbone with a new head of `num_classes`, and its adapters attached.

    Raises:
        VizattnError: Unknown model or option, or another number of classes than the data's.
    """
    import timm

    import vizattn

    options = dict(config["model"])
    name = options.pop("name")
    asked = options.pop("num_classes", num_classes)
    if asked != num_classes:
        raise VizattnError(
            f"The recipe says model.num_classes={asked}, but the data has {num_classes} classes. Leave it out: "
            "the head takes its size from the data."
        )
    if not timm.is_model(name.split("/")[-1].split(".")[0]) and ":" not in name:
        raise unknown("model", name, timm.list_models(), "vizattn list PATTERN")
    try:
        model = timm.create_model(name, num_classes=num_classes, **options)
    except VizattnError:
        raise
    except Exception as error:  # timm and the hub raise all kinds
        hint = " model.pretrained=False does without its weights." if options["pretrained"] else ""
        raise VizattnError(f"Cannot create the model {name!r} with {options}: {error}{hint}") from error
    adapters = config["adapter"] or []
    for entry in [adapters] if isinstance(adapters, Mapping) else adapters:
        vizattn.attach(model, keep_original=False, **entry)
    return model


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
