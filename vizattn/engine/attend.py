"""What a model makes of one image, with its attention, ready to be shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as VF

from vizattn.adapters.anatomy import core
from vizattn.data import build_transforms, preprocessing_of
from vizattn.engine.attention_page import View
from vizattn.engine.evaluate import Trained
from vizattn.engine.models import weights_options
from vizattn.errors import VizattnError, unknown
from vizattn.explain import attention_maps, relevance, rollout
from vizattn.heads import Segmenter

__all__ = ["attention_view", "load_pretrained"]

#: Classes that are reported, and for which the relevance is shown.
REPORTED, EXPLAINED = 5, 3


def load_pretrained(name: str, weights: str | Path | None = None) -> Trained:
    """A backbone with the weights and the classes that it is published with.

    Args:
        name: As timm knows it.
        weights: Its published file, got by hand.

    Raises:
        VizattnError: There is no such model, or its weights cannot be had.
    """
    if not timm.is_model(name.split("/")[-1].split(".")[0]) and ":" not in name:
        raise unknown("model", name, timm.list_models(), "vizattn list PATTERN")
    options = {key.removeprefix("model."): value for key, value in weights_options(weights).items()}
    try:
        model = timm.create_model(name, **options).eval()
    except VizattnError:
        raise
    except Exception as error:  # timm and the hub raise all kinds
        raise VizattnError(f"Cannot create the model {name!r} with its weights: {error}") from error
    return Trained(model, _published_names(model), preprocessing_of(model), None)


def _published_names(model: Any) -> list[str]:
    cfg, classes = model.pretrained_cfg, int(getattr(model, "num_classes", 0) or 0)
    packaged = files("vizattn") / "weights"
    if cfg.get("file") and Path(cfg["file"]).parent == Path(str(packaged)) and classes == 52:
        from vizattn.data.glyphs import CLASS_NAMES

        return list(CLASS_NAMES)
    subset = infer_imagenet_subset(cfg)
    if subset and classes == cfg["num_classes"]:
        info = ImageNetInfo(subset)
        if info.num_classes() == classes:
            return [info.index_to_description(i) for i in range(classes)]
    return [f"class {i}" for i in range(classes)]


def attention_view(trained: Trained, image: Image.Image, name: str) -> View:
    """The attention of a model on an image, which is cut to the model's native size, and its answer.

    Rollout and relevance are there where they are defined: for token models, relevance for those that classify.

    Args:
        trained: The model.
        image: RGB.
        name: Of the image.

    Raises:
        VizattnError: The attention of the model is not known, see `vizattn.explain.attention_maps`.
    """
    model = trained.model
    x = build_transforms(trained.preprocessing, train=False)(image)
    picture = _as_seen(x, trained.preprocessing)
    x = x[None].to(next(model.parameters()))
    maps = attention_maps(model, x)
    with torch.inference_mode():
        logits = model(x)
    probabilities = _probabilities(model, logits)
    best = [] if probabilities is None else probabilities.topk(min(REPORTED, len(probabilities))).indices.tolist()
    whole: list[tuple[str, np.ndarray]] = []
    with contextlib.suppress(VizattnError):  # a pyramid, or the answer comes from elsewhere
        whole.append(("rollout", _array(rollout(model, x))))
    for target in best[:EXPLAINED]:
        with contextlib.suppress(VizattnError):
            whole.append((f"relevance for {trained.class_names[target]}", _array(relevance(model, x, target))))
    return View(
        title=f"Attention of {_title(model)} on {name}",
        picture=picture,
        maps=maps,
        token_names=[*_token_names(core(model))],
        predictions=[(trained.class_names[i], f"{100 * float(probabilities[i]):.1f} %") for i in best]  # type: ignore[index]
        if probabilities is not None
        else [],
        measure="share of the pixels" if isinstance(model, Segmenter) else "probability",
        whole=whole,
    )


def _as_seen(x: Tensor, preprocessing: dict[str, Any]) -> Image.Image:
    """The picture that a normalised tensor (3, H, W) shows."""
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return VF.to_pil_image((x * std + mean).clamp(0, 1))


def _probabilities(model: nn.Module, logits: Any) -> Tensor | None:
    """Of each class (classes,); shares of the pixels by a segmenter; None from a model without classes."""
    if isinstance(model, Segmenter):
        classes = logits.shape[1]
        return torch.bincount(logits.argmax(1).flatten().cpu(), minlength=classes).float() / logits[0, 0].numel()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not getattr(model, "num_classes", 0):
        return None
    return logits[0].float().softmax(0).cpu()


def _token_names(model: Any) -> Iterator[str]:
    """What the tokens before the patches are called."""
    own = int(getattr(model, "num_prefix_tokens", 0))
    if own and getattr(model, "cls_token", None) is not None:
        yield "class token"
        own -= 1
        if own and getattr(model, "dist_token", None) is not None:
            yield "distillation token"
            own -= 1
    yield from (f"register {i + 1}" for i in range(own))


def _title(model: nn.Module) -> str:
    cfg: Any = getattr(core(model), "pretrained_cfg", None)
    return str(cfg["architecture"]) if cfg else type(core(model)).__name__


def _array(values: Tensor) -> np.ndarray:
    return values[0].float().cpu().numpy()
