"""From a resolved configuration to the objects of a run: model, data, loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vizattn.adapters.bundle import OWN_WEIGHTS
from vizattn.engine.runner import rank_and_world
from vizattn.errors import VizattnError, unknown

__all__ = [
    "OWN_WEIGHTS",
    "Data",
    "build_data",
    "build_model",
    "check_classes",
    "choose_device",
    "make_loader",
    "model_preprocessing",
    "set_transforms",
    "weights_options",
]

_LOADING = ("name", "root", "batch_size", "num_workers", "augment")


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


def set_transforms(data: Data, preprocessing: Mapping[str, Any], augment: str) -> None:
    """Give each split its transform: `augment` is for training."""
    from vizattn.data import build_transforms

    for split, dataset in data.splits.items():
        dataset.transform = build_transforms(dict(preprocessing), train=split == "train", augment=augment)


def make_loader(
    dataset: Any, config: Mapping[str, Any], device: torch.device, *, train: bool, num_workers: int | None = None
) -> DataLoader:
    """This process's loader; `data.batch_size` is that of one process. Without gradients, at least 64 images fit."""
    from vizattn.data.loader import build_loader

    rank, world_size = rank_and_world()
    return build_loader(
        dataset,
        config["data"]["batch_size"] if train else max(64, config["data"]["batch_size"]),
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
        VizattnError: Unknown model or option, another number of classes than the data's, a model that does not
            classify RGB images, or frozen weights that a bundle could not name.
    """
    import timm

    import vizattn
    from vizattn.adapters import make_options

    given = config["adapter"] or []
    adapters = [dict(entry) for entry in ([given] if isinstance(given, Mapping) else given)]
    methods = [entry.pop("method") for entry in adapters]
    for method, entry in zip(methods, adapters):
        make_options(method, entry)  # a mistake there is cheaper to find before the model is made
    options = dict(config["model"])
    if methods:
        _check_rebuildable(options, methods)
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
    _check_classifier(model, config["model"], num_classes)
    for method, entry in zip(methods, adapters):
        vizattn.attach(model, method, keep_original=False, **entry)
    return model


def weights_options(file: str | Path | None) -> dict[str, Any]:
    """The recipe's options for pretrained weights, from `file` where one is given.

    Raises:
        VizattnError: There is no such file.
    """
    if file is None:
        return {"model.pretrained": True}
    if not Path(file).is_file():
        raise VizattnError(f"There is no file of weights {file}.")
    return {"model.pretrained": True, "model.pretrained_cfg_overlay": {"file": str(Path(file).resolve())}}


def _check_rebuildable(model: Mapping[str, Any], methods: Sequence[str]) -> None:
    """A bundle holds what was trained and names the rest, so the frozen weights must be ones that timm can find."""
    from vizattn.adapters import METHODS

    if any(METHODS[method].trains_backbone for method in methods):
        return
    if not model["pretrained"]:
        problem = "model.pretrained=False: its random weights would be lost"
    elif ":" in model["name"]:
        problem = f"model.name={model['name']!r}: it would not be found again"
    elif own := [key for key in OWN_WEIGHTS if model.get(key)]:
        problem = f"model.{own[0]}={model[own[0]]!r}: these weights would not be found again"
    else:
        return
    raise VizattnError(
        f"The adapter {methods[0]!r} keeps the backbone frozen, and its bundle names the backbone without holding it, "
        f"which cannot be with {problem}. Use a name that timm lists with model.pretrained=True (a published file "
        "got by hand becomes its own by: vizattn weights fetch NAME --from FILE), or train and save the whole model "
        "with adapter=dict(method='full')."
    )


def _check_classifier(model: nn.Module, options: Mapping[str, Any], num_classes: int) -> None:
    """See that an image gives one row of logits, by a blank one."""
    training = model.training
    try:
        size = model_preprocessing(model, options)["input_size"]
        with torch.no_grad():
            given = model.eval()(torch.zeros(1, 3, *size[1:]))
        problem = None if given.shape == (1, num_classes) else f"it gives an output of shape {tuple(given.shape)}"
    except Exception as error:  # whatever the model's code raises, or an output that is no tensor
        problem = f"an RGB image fails with {type(error).__name__}: {str(error) or 'no message'}"
    model.train(training)
    if problem:
        chosen = {key: value for key, value in options.items() if key not in ("name", "pretrained")}
        raise VizattnError(
            f"The model {options['name']!r} with {chosen or 'its defaults'} cannot be trained to tell {num_classes} "
            f"classes of RGB images: {problem}; logits of shape (1, {num_classes}) are needed."
        )


def model_preprocessing(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the images of `model` go through; `options` are those it was created with, such as `img_size`."""
    from vizattn.data import preprocessing_of

    preprocessing = preprocessing_of(model)
    if size := options.get("img_size"):
        preprocessing["input_size"] = [3, *([size] * 2 if isinstance(size, int) else size)]
    return preprocessing


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
