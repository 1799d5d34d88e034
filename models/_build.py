"""What every family's entrypoints share: the default cfgs, and building a model with or without its weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from vizattn.errors import VizattnError

__all__ = ["build", "glyphs_cfg", "imagenet_cfg"]

Model = TypeVar("Model", bound=nn.Module)


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """A default cfg for 224 x 224 images normalised by ImageNet's statistics, pyramid of stride 32; `kwargs` differ."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        **kwargs,
    }


def glyphs_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """The default cfg of a nano size, trained on 32 x 32 drawn letters; its weights ship in the package."""
    file = Path(str(files("vizattn"))) / "weights" / f"{name}.safetensors"
    return imagenet_cfg(
        **{
            "file": str(file) if file.is_file() else "",
            "num_classes": 52,
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            **kwargs,
        }
    )


def build(
    model_class: Callable[..., Model],
    name: str,
    pretrained: bool,
    filter_fn: Callable[..., Any],
    feature_cfg: dict[str, Any],
    **kwargs: Any,
) -> Model:
    """timm's `build_model_with_cfg`, with one clear message where weights cannot be had.

    Args:
        model_class: The family's class.
        name: The registered name.
        pretrained: Whether to load weights.
        filter_fn: The family's `checkpoint_filter_fn`.
        feature_cfg: How `features_only` works; `out_indices` of `kwargs` take precedence.
        **kwargs: Arguments of the class, and timm's own.

    Raises:
        VizattnError: The weights cannot be loaded.
    """
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if "out_indices" in kwargs:
        feature_cfg = {**feature_cfg, "out_indices": kwargs.pop("out_indices")}
    try:
        return build_model_with_cfg(
            model_class, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs
        )
    except OSError as error:  # no such file, no network
        hub = f"the Hugging Face hub ({cfg.hf_hub_id})" if cfg.hf_hub_id else cfg.url
        reason = str(error) or "There is no such file."
        raise VizattnError(f"The weights of {name!r} could not be loaded from {cfg.file or hub}. {reason}") from error
