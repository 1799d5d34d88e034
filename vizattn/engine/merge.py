"""A bundle and its backbone as one plain model that timm loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models._hub import save_config_for_hf

import vizattn
from vizattn.adapters import METHODS, read_bundle
from vizattn.engine.evaluate import export_whole, load_trained
from vizattn.errors import VizattnError
from vizattn.files import replacing
from vizattn.heads import Segmenter

__all__ = ["merge_bundle"]


def merge_bundle(folder: Path, target: Path, weights: str | Path | None = None) -> float:
    """Fold the adapters of a bundle into the weights of its backbone, and write the whole model.

    `target` gets `model.safetensors` and `model.json`, which `load_trained` reads, and of a classifier `config.json`:
    ``timm.create_model("local-dir:TARGET", pretrained=True)`` makes it, or ``timm.create_model(name, num_classes=...,
    checkpoint_path="TARGET/model.safetensors")``.

    Args:
        folder: The bundle.
        target: Created if it is missing.
        weights: A file with the pretrained weights of the backbone; by default timm gets them.

    Returns:
        The largest difference of a logit from the bundle's, on random images of its size; 0 where the arithmetic is
        the same.

    Raises:
        VizattnError: A method that does not merge, with the reason, a model in `target`, or as `load_trained`.
    """
    bundle = read_bundle(folder)
    for adapter in bundle["adapters"]:
        if (why := METHODS[adapter["method"]].mergeable) is not True:
            raise VizattnError(f"{folder} cannot be merged, as its adapter {adapter['method']!r} cannot be: {why}.")
    if (target / "model.json").exists():
        raise VizattnError(f"There is a model in {target} already: name another folder.")
    trained = load_trained(folder, weights)
    model: Any = trained.model
    images = torch.randn(2, *trained.preprocessing["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        vizattn.merge(model)
        difference = (model(images) - before).abs().max().item()
    backbone = bundle["backbone"]
    options = {"name": backbone["name"], **backbone["args"]}
    if backbone.get("out_indices"):
        options["out_indices"] = backbone["out_indices"]
    config = None if trained.config is None else {**trained.config, "adapter": None}
    target.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, Segmenter):
        with replacing(target / "config.json") as temporary:
            labels = {"label_names": trained.class_names}
            save_config_for_hf(model, str(temporary), labels, data_config=dict(trained.preprocessing))
    export_whole(model, target, options, config, trained.class_names, trained.preprocessing, trained.palette)
    return difference
