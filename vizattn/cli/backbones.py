"""What `vizattn list` and `vizattn info` say of a backbone. Models are built without memory, on the meta device."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

from vizattn.bench.macs import count_macs

__all__ = ["build_empty", "costs", "family", "gmacs", "our_names", "parameters", "summary", "timm_names"]


def our_names() -> list[str]:
    """Names of the backbones that vizattn registers."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("vizattn.")]


def timm_names() -> list[str]:
    """Names of all other registered backbones."""
    ours = set(our_names())
    return [name for name in timm.list_models() if name not in ours]


def family(name: str) -> str:
    """The family of a backbone, by its module: that of ``agent_swin_tiny``, of `models/agent_swin.py`, is "agent"."""
    package, _, module = model_entrypoint(name).__module__.rpartition(".")
    return module.partition("_")[0] if package == "vizattn.models" else module


@lru_cache(maxsize=1)
def costs() -> dict[str, dict[str, Any]]:
    """``{"parameters", "gmacs"}`` of each of our backbones as registered, so that no model need be built to list them.

    `tools/make_cards.py` writes the table from what `tools/measure_zoo.py` counted.
    """
    table: dict[str, dict[str, Any]] = json.loads((files("vizattn.weights") / "costs.json").read_text("utf-8"))
    return table


def summary(name: str) -> dict[str, Any]:
    """One row of the list; parameters (classifier included) and multiply-adds are None for those of timm.

    The licence is that of the weights.
    """
    cfg = get_pretrained_cfg(name)
    cost = costs().get(name, {})
    weights = weights_source(cfg)
    return {
        "name": name,
        "parameters": cost.get("parameters"),
        "gmacs": cost.get("gmacs"),
        "input": list(cfg.input_size[1:]) if cfg else None,
        "weights": weights,
        "licence": (cfg.license or None) if cfg and weights != "none" else None,
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


def parameters(model: nn.Module) -> int:
    """Number of parameters, those of the classifier included."""
    return sum(p.numel() for p in model.parameters())


def gmacs(model: nn.Module, input_size: tuple[int, ...]) -> float:
    """Thousand million multiply-adds of one image of `input_size` (C, H, W), for a model from `build_empty`."""
    with torch.no_grad():
        return count_macs(lambda: model(torch.empty(1, *input_size, device="meta"))) / 1e9
