"""What every family's entrypoints share: the default cfgs, and building a model with or without its weights."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, model_entrypoint, resolve_pretrained_cfg
from torch import nn

from vizattn.errors import VizattnError
from vizattn.weights import converted, fetch, fitted, kept_in, read_weights, release_names, release_of

from ._adapted import adaptations
from ._checkpoint import unwrap

__all__ = ["build", "glyphs_cfg", "imagenet_cfg"]

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger("vizattn")


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
    """timm's `build_model_with_cfg`, with released weights from our cache and one clear message where there are none.

    What is dropped, resized or newly initialised, as the model differs from the weights', is logged.

    Args:
        model_class: The family's class.
        name: The registered name.
        pretrained: Whether to load weights.
        filter_fn: The family's `checkpoint_filter_fn`.
        feature_cfg: How `features_only` works; `out_indices` of `kwargs` take precedence.
        **kwargs: Arguments of the class, and timm's own.

    Raises:
        VizattnError: The weights cannot be had or do not fit.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
    if "out_indices" in kwargs:
        feature_cfg = {**feature_cfg, "out_indices": kwargs.pop("out_indices")}
    elsewhere = cfg.state_dict or cfg.source in ("hf-hub", "local-dir")
    release = release_of(cfg) if pretrained and not elsewhere and not cfg.file else None
    if pretrained and not elsewhere and not cfg.file and not release:
        raise _none_released(name)
    file = Path(str(cfg.file)) if pretrained and cfg.file and not elsewhere else None
    if release:
        with kept_in(kwargs.get("cache_dir")):
            file = fetch(release)
    if file:  # read below: timm goes by the ending of its name, and prefers other entries of a checkpoint than we
        overlay["state_dict"] = {_FILE: str(file)}
    headless = bool(kwargs.get("features_only"))

    def not_loaded(error: Exception) -> VizattnError:
        hub = f"the Hugging Face hub ({cfg.hf_hub_id})" if cfg.hf_hub_id else cfg.url
        source = file or cfg.file or hub
        missing = isinstance(error, FileNotFoundError)
        reason = "There is no such file." if missing else " ".join(str(error).split())
        if release:
            registered = release.key in release_names()
            mend = f"fetch it anew with: vizattn weights fetch {release.key} --again" if registered else "remove it."
            reason = f"{reason.rstrip('.')}. If the file is damaged, {mend}"
        return VizattnError(f"The weights of {name!r} could not be loaded from {source}. {reason}")

    def fit(checkpoint: dict[str, Any], model: nn.Module) -> Any:
        try:
            if file:
                checkpoint = read_weights(file)
            state = fitted(checkpoint, model, filter_fn)
        except VizattnError as error:
            raise (not_loaded(error) if release else error) from error.__cause__
        given = unwrap(checkpoint)
        if file and not release and not given.keys() >= state.keys():  # under the names of its release
            with suppress(VizattnError):
                given = converted(checkpoint, cfg)
        if changes := adaptations(given, state, model, cfg, headless):
            logger.warning("The weights of %s are adapted: %s.", name, "; ".join(changes))
        return state

    try:
        model = build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=fit,
            feature_cfg=feature_cfg,
            **kwargs,
        )
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if not pretrained or (isinstance(error, RuntimeError) and not str(error).startswith(_LOADING)):
            raise
        raise not_loaded(error) from error
    if file:
        _forget(model)
    return model


_FILE = "the file of the weights"

# How the messages begin by which torch and timm refuse a file, a damaged archive, and weights that do not fit.
_LOADING = ("weights_only=True blocked", "PytorchStreamReader", "Error(s) in loading state_dict", "Invalid magic")


def _none_released(name: str) -> VizattnError:
    family = model_entrypoint(name).__module__
    others = {full.partition(".")[0] for full in release_names()}
    others = {other for other in others if model_entrypoint(other).__module__ == family}
    hint = f"; of its family these have some: {', '.join(sorted(others))}" if others else ""
    return VizattnError(f"There are no weights of {name!r} to load, use it with pretrained=False{hint}.")


def _forget(model: nn.Module) -> None:
    """Take the place in our cache out of the cfg, which is saved and published with the model."""
    for part in model.modules():
        cfg = getattr(part, "pretrained_cfg", None)
        if isinstance(cfg, dict) and _FILE in (cfg.get("state_dict") or {}):
            del cfg["state_dict"]
