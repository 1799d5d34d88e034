"""The rows of the contract test: one a method, one a family of models. All models are tiny."""

from __future__ import annotations

import zlib
from typing import Any

import timm
import torch
from torch import nn

import vizattn
from vizattn.adapters import attached
from vizattn.attention import ATTENTION
from vizattn.heads import Segmenter

#: method, options
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_probe": ("linear_probe", {}),
    "full": ("full", {}),
    "vpt_deep": ("vpt", {"num_tokens": 3}),
    "vpt_shallow": ("vpt", {"num_tokens": 3, "deep": False}),
    "vpt_projected": ("vpt", {"num_tokens": 3, "project": 8}),
    "apla": ("apla", {"num_rows": 5}),
    "hst": ("hst", {"widths": (8, 8, 16, 16), "num_heads": (2, 2, 4, 4)}),
    "side_tuning": ("side_tuning", {"width": 8}),
    "efficient_probing": ("efficient_probing", {"num_queries": 4}),
}

_VIT = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}
_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "drop_path_rate": 0.0,
}

#: One block of each attention that takes tokens of an adapter; side-tuning needs four.
_ATTENTIONS = [name for name in ATTENTION if hasattr(ATTENTION[name], "project_kv")]
_MIXED = {"attn": (_ATTENTIONS * 4)[: max(4, len(_ATTENTIONS))], "depth": max(4, len(_ATTENTIONS))}

#: timm name, creation arguments
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_va": ("vit_va_nano_patch4_32", {"patch_size": 8, "depth": 4, "embed_dim": 48}),
    "vit": ("vit_tiny_patch16_224", _VIT),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", _VIT),
    "siglip": ("vit_base_patch16_siglip_224", _VIT),
    "clip": ("vit_base_patch16_clip_224", _VIT),
    "dinov3": ("vit_small_patch16_dinov3", _VIT),
    "beit": ("beit_base_patch16_224", _VIT),
    "eva02": ("eva02_tiny_patch14_224", _VIT),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "swinv2": ("swinv2_tiny_window8_256", _SWIN),
    "vit_attentions": ("vit_va_nano_patch4_32", {**_MIXED, "patch_size": 4, "embed_dim": 32, "num_heads": 2}),
    "deit_agent": ("deit_agent_nano_patch4_32", {"patch_size": 8, "depth": 4, "embed_dim": 48}),
    "biformer": ("biformer_nano", {"embed_dims": (16, 24, 32), "depths": (1, 1, 1), "n_win": 4, "head_dim": 8}),
    "nat": (
        "nat_nano",
        {"embed_dim": 16, "depths": (2, 1, 1), "num_heads": (2, 2, 2), "kernel_size": 3, "dilations": (2, 1, 1)},
    ),
    "agent_pvt": (
        "agent_pvt_tiny",
        {
            "img_size": 32,
            "embed_dims": (16, 24, 32),
            "depths": (1, 1, 1),
            "num_heads": (1, 2, 2),
            "num_agents": (4, 4, 4),
            "mlp_ratios": (2, 2, 2),
        },
    ),
    "agent_swin": (
        "agent_swin_tiny",
        {
            "img_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": (1, 2),
            "num_heads": (2, 2),
            "agent_blocks": (1, 0),
            "num_agents": (4, 4),
            "window_size": 5,
        },
    ),
    "agent_cswin": (
        "agent_cswin_tiny",
        {
            "img_size": 32,
            "embed_dim": 8,
            "depths": (1, 1, 1),
            "num_heads": (2, 2, 2),
            "agent_stages": 1,
            "num_agents": (4,),
            "split_size": 3,
        },
    ),
    "l2vit": (
        "l2vit_nano",
        {"embed_dims": (16, 24, 32), "depths": (2, 1, 2), "num_heads": (2, 2, 2), "window_size": 3},
    ),
    "halonet": (
        "halonet_va_nano",
        {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 2), "stem_dim": 16, "final_dim": 40},
    ),
    "efficientvit": ("efficientvit_va_nano", {"embed_dims": (16, 24, 32), "depths": (1, 1, 1), "num_heads": (2, 3, 2)}),
}

PYRAMIDS = {
    "swin",
    "swinv2",
    "nat",
    "agent_pvt",
    "agent_swin",
    "agent_cswin",
    "l2vit",
    "biformer",
    "halonet",
    "efficientvit",
}

#: What does not attach: method row -> model rows.
REFUSED = {
    "vpt_deep": {"swinv2", "halonet", "efficientvit"},
    "vpt_shallow": PYRAMIDS,
    "vpt_projected": PYRAMIDS,
    "hst": PYRAMIDS,
}

#: Models that are tried as maps under a segmentation head.
DENSE_ROWS = ("vit_va", "vit", "nat", "biformer", "swin")

COMBINATIONS = [(m, b) for m in METHODS for b in MODELS if b not in REFUSED.get(m, set())]
DENSE = [(m, b) for m, b in COMBINATIONS if b in DENSE_ROWS]


def create(row: str, num_classes: int = 5, **kwargs: Any) -> nn.Module:
    """A tiny model of a row (of "row/name": with that attention), the same weights on every call, in eval mode."""
    row, _, attention = row.partition("/")
    name, args = MODELS[row]
    args = {**args, "attn": attention} if attention else args
    model = timm.create_model(name, num_classes=num_classes, **{**args, **kwargs})
    with torch.no_grad():  # zero biases and layer scales of 1e-5 would hide mistakes
        for key, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            value = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim >= 2 and "token" not in key
            value *= parameter[0].numel() ** -0.5 if matrix else 0.1
            parameter.copy_(value + 1 if parameter.ndim == 1 and key.endswith("weight") else value)
    return model.eval()


def create_maps(row: str, method: str | None = None, **kwargs: Any) -> nn.Module:
    """The model of a row as maps of features, a method attached."""
    maps = create(row, num_classes=0, features_only=True, **kwargs)
    if method is not None:
        torch.manual_seed(11)
        vizattn.attach(maps, METHODS[method][0], **METHODS[method][1])
    return maps


def create_segmenter(row: str, method: str, **kwargs: Any) -> Segmenter:
    """The same under a linear head of 7 classes."""
    return Segmenter(create_maps(row, method, **kwargs), 7, head="linear")


def images(batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Images of the size of every row."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 3) -> None:
    """Move everything that trains away from its initial value, moving statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        everything = any(a.options.trains_backbone for a in attached(model))
        for name, buffer in model.named_buffers():
            if (everything or name.startswith("adapters.")) and name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
