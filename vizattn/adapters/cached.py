"""Methods that leave the features frozen: these can be computed once, and the rest trained from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vizattn.adapters.anatomy import core, map_source
from vizattn.adapters.base import attached
from vizattn.errors import VizattnError

__all__ = ["cache_level", "frozen_features", "head_from_features"]


def cache_level(model: nn.Module) -> str | None:
    """Which features stay frozen: "pooled" (B, D), "tokens" as `forward_features` returns them; None for maps."""
    levels = {a.options.cache_level for a in attached(model)}
    inner: Any = core(model)
    if len(levels) != 1 or map_source(model) is not None or isinstance(inner.get_classifier(), tuple):
        return None
    return levels.pop()


@torch.no_grad()
def frozen_features(model: nn.Module, images: Tensor) -> Tensor:
    """The frozen part of the forward on images (B, C, H, W).

    Raises:
        VizattnError: no part of the forward up to the head is frozen.
    """
    inner: Any = core(model)
    level = cache_level(model)
    if level is None:
        raise VizattnError("This model has no frozen features: its adapters change them.")
    features = inner.forward_features(images)
    return features if level == "tokens" else inner.forward_head(features, pre_logits=True)


def head_from_features(model: nn.Module, features: Tensor) -> Tensor:
    """The trained rest of the forward: what `frozen_features` returned to logits (B, classes)."""
    inner: Any = core(model)
    return inner.forward_head(features) if cache_level(model) == "tokens" else inner.get_classifier()(features)
