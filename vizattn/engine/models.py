"""The model of a resolved recipe: a backbone with its adapters and a new head, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vizattn.adapters.anatomy import core
from vizattn.adapters.bundle import OWN_WEIGHTS
from vizattn.errors import VizattnError, unknown

__all__ = ["OWN_WEIGHTS", "build_model", "build_segmenter", "check_model", "model_preprocessing", "weights_options"]


def build_model(config: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The recipe's backbone with a new head of `num_classes`, and its adapters attached.

    Raises:
        VizattnError: Unknown model or option, another number of classes than the data's, a model that does not
            classify RGB images, or frozen weights that a bundle could not name.
    """
    model = _create(config, num_classes=num_classes)
    _check_classifier(model, config["model"], num_classes)
    return _attach(model, config)


def build_segmenter(config: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The recipe's backbone as maps of features, its adapters attached, and a new segmentation head.

    Raises:
        VizattnError: Unknown model, head or option, a backbone without maps, or frozen weights that a bundle could not
            name.
    """
    from vizattn.heads import Segmenter

    backbone = _attach(_create(config, features_only=True), config)
    options = dict(config["head"])
    name = options.pop("name")
    try:
        return Segmenter(backbone, num_classes, head=name, **options)
    except VizattnError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise VizattnError(f"Cannot make the head {name!r} with {options}: {error}") from error


def _adapters_of(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(method, options) of each adapter of a recipe."""
    given = config["adapter"] or []
    entries = [dict(entry) for entry in ([given] if isinstance(given, Mapping) else given)]
    return [(entry.pop("method"), entry) for entry in entries]


def _attach(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    import vizattn

    for method, options in _adapters_of(config):
        vizattn.attach(model, method, keep_original=False, **options)
    return model


def check_model(config: Mapping[str, Any]) -> None:
    """See what can be seen of a resolved recipe's model and adapters before the model is made.

    Raises:
        VizattnError: Unknown model or adapter option, or frozen weights that a bundle could not name.
    """
    import timm

    import vizattn  # noqa: F401  (registers the backbones)
    from vizattn.adapters import make_options

    adapters, name = _adapters_of(config), config["model"]["name"]
    for method, entry in adapters:
        make_options(method, entry)
    if adapters:
        _check_rebuildable(config["model"], [method for method, _ in adapters])
    if not timm.is_model(name.split("/")[-1].split(".")[0]) and ":" not in name:
        raise unknown("model", name, timm.list_models(), "vizattn list PATTERN")


def _create(config: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    """The recipe's backbone as `kwargs` ask for it, with its pretrained weights."""
    import timm

    check_model(config)
    options = dict(config["model"])
    name = options.pop("name")
    num_classes = kwargs.get("num_classes")
    asked = options.pop("num_classes", num_classes)
    if asked != num_classes:
        raise VizattnError(
            f"The recipe says model.num_classes={asked}"
            + (f", but the data has {num_classes} classes" if num_classes is not None else "")
            + ". Leave it out: the head takes its size from the data."
        )
    try:
        return timm.create_model(name, **kwargs, **options)
    except VizattnError:
        raise
    except Exception as error:  # timm and the hub raise all kinds
        hint = " model.pretrained=False does without its weights." if options["pretrained"] else ""
        raise VizattnError(f"Cannot create the model {name!r} with {options}: {error}{hint}") from error


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
        size = model_preprocessing(model, {"model": options, "data": {}})["input_size"]
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


def model_preprocessing(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the images of `model` go through by a recipe that says how it was created and how images are resized."""
    from vizattn.data import preprocessing_of

    preprocessing = preprocessing_of(core(model))  # a segmenter's images are its backbone's
    if size := config["model"].get("img_size"):
        preprocessing["input_size"] = [3, *([size] * 2 if isinstance(size, int) else size)]
    if config["data"].get("resize") == "squash":
        preprocessing |= {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"}
    return preprocessing
