"""What `vizattn list` and `vizattn info` say of a backbone. Models are built without memory, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["build_empty", "gmacs", "our_names", "summary", "timm_names"]


def our_names() -> list[str]:
    """Names of the backbones that vizattn registers."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("vizattn.")]


def timm_names() -> list[str]:
    """Names of all other registered backbones."""
    ours = set(our_names())
    return [name for name in timm.list_models() if name not in ours]


def summary(name: str, count: bool = True) -> dict[str, Any]:
    """One row of the list. The parameters, classifier included, are counted only if `count`: that builds the model."""
    cfg = get_pretrained_cfg(name)
    return {
        "name": name,
        "parameters": sum(p.numel() for p in build_empty(name).parameters()) if count else None,
        "input": list(cfg.input_size[1:]) if cfg else None,
        "weights": weights_source(cfg),
        "licence": (cfg.license if cfg else None) or None,
    }


def weights_source(cfg: Any) -> str:
    """Where `pretrained=True` finds the weights: ``"packaged"``, ``"released"`` (to download) or ``"none"``."""
    if cfg is not None and cfg.file and Path(cfg.file).is_file():
        return "packaged"
    return "released" if cfg is not None and (cfg.hf_hub_id or cfg.url) else "none"


def build_empty(name: str) -> nn.Module:
    """The backbone in eval mode with shapes but no values, frozen (else the flop counter hooks into its gradients)."""
    with torch.device("meta"):
        return timm.create_model(name).eval().requires_grad_(False)


def gmacs(model: nn.Module, input_size: tuple[int, ...]) -> float:
    """Thousand million multiply-adds of one image of `input_size` (C, H, W), for a model from `build_empty`."""
    # The counter knows this operation only when it is not in place.
    in_place = {torch.ops.aten.baddbmm_: lambda _sum, a, b, **_kwargs: 2 * a[0] * a[1] * a[2] * b[2]}  # shapes
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() / 2e9
