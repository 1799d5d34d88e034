"""Backbones beside resnet50, the unit, and beside timm's models of the same name or size."""

from __future__ import annotations

import copy
import functools
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import Tensor

from vizattn.bench.case import Case, Options, Work, autocast
from vizattn.bench.ops import text_of
from vizattn.bench.variants import check_variants, prepare
from vizattn.errors import VizattnError, unknown

__all__ = ["DEFAULT", "UNIT", "cases", "peer_of"]

UNIT = "resnet50"

DEFAULT = (
    *("biformer_tiny", "biformer_small", "biformer_base", "deit_agent_tiny", "deit_agent_small", "agent_swin_tiny"),
    *("agent_pvt_tiny", "agent_pvt_small", "agent_cswin_tiny", *(f"efficientvit_va_m{i}" for i in range(6))),
    *("l2vit_tiny", "l2vit_small", "l2vit_base", "nat_mini", "nat_tiny", "dinat_mini", "dinat_tiny", "dinat_s_tiny"),
    *("vit_va_tiny_patch16_224", "vit_va_base_patch16_224", "halonet_va_h1"),
)
"""What is measured unless models are named: the families, most in the sizes whose released code has been timed."""

# timm's models with about the parameters and multiply-adds of those of ours that it does not have itself.
_OF_SIZE = {
    "pvt_v2_b1": ("biformer_tiny", "agent_pvt_tiny"),
    "pvt_v2_b2": ("agent_pvt_small",),
    "pvt_v2_b3": ("agent_pvt_medium",),
    "pvt_v2_b4": ("agent_pvt_large",),
    "convnext_nano": ("nat_mini", "dinat_mini"),
    "swin_tiny_patch4_window7_224": (
        *("agent_swin_tiny", "agent_cswin_tiny", "l2vit_tiny", "nat_tiny", "dinat_tiny", "dinat_s_tiny"),
        *("biformer_small", "biformer_stl"),
    ),
    "swin_small_patch4_window7_224": (
        *("agent_swin_small", "agent_cswin_small", "l2vit_small", "nat_small", "dinat_small", "dinat_s_small"),
        "biformer_base",
    ),
    "swin_base_patch4_window7_224": (
        *("agent_swin_base", "agent_cswin_base", "l2vit_base", "nat_base", "dinat_base", "dinat_s_base"),
    ),
    "swin_large_patch4_window7_224": ("dinat_large", "dinat_s_large"),
    "deit_tiny_patch16_224": ("deit_agent_tiny",),
    "deit_small_patch16_224": ("deit_agent_small",),
    "deit_base_patch16_224": ("deit_agent_base",),
}


def peer_of(name: str) -> str | None:
    """timm's model of the same name (without ``_va``) or about the same size, if there is one."""
    same = name.replace("_va_", "_", 1)
    if same != name and is_model(same):
        return same
    return next((peer for peer, names in _OF_SIZE.items() if name in names), None)


def build(name: str, mode: str, batch: int, size: tuple[int, int], dtype: str, variant: str) -> Work:
    """A forward pass in eval mode, or a training step without its optimizer."""
    torch.manual_seed(0)
    model, called, x = prepare(
        create(name, size).train(mode == "train"), torch.randn(batch, channels(name), *size), variant, dtype
    )

    def step(call: Any, x: Tensor) -> Tensor:
        if mode == "forward":
            with torch.inference_mode(), autocast(dtype):
                return call(x)
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            loss = call(x).float().square().mean()
        loss.backward()
        return loss

    def counted() -> Tensor:
        """On the meta device attention is computed by its definition, without products that stand in for sums."""
        return step(copy.deepcopy(model).to("meta"), x.to("meta"))

    return Work(lambda: step(called, x), counted=counted, images=batch)


def create(name: str, size: tuple[int, int], **options: Any) -> Any:
    """The model for images of this size; those built for one size are told."""
    cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size and tuple(cfg.input_size[1:]) != size:
        options["img_size"] = size
    return timm.create_model(name, **options)


def channels(name: str) -> int:
    """Channels of its images."""
    cfg = get_pretrained_cfg(name)
    return cfg.input_size[0] if cfg else 3


def is_ours(name: str) -> bool:
    """Whether vizattn registered it."""
    return model_entrypoint(name).__module__.startswith("vizattn.")


def cases(options: Options) -> list[Case]:
    """Each backbone with its peers, at each shape."""
    check_variants(options.variants)
    for name in options.models or ():
        if not is_model(name):
            raise unknown("backbone", name, timm.list_models(), "vizattn list --timm")
    modes = options.modes or ("forward", "train")
    if "train" in modes and any("fuse" in variant for variant in options.variants):
        raise VizattnError("A fused model is for inference: give --mode forward with --variant fuse.")
    found = []
    for name in options.models or DEFAULT:
        for size in options.sizes or (_native(name),):
            for batch in options.batches or (2,):
                for dtype in options.dtypes:
                    for mode in modes:
                        found += _comparison(name, mode, batch, size, dtype, options.variants)
    return found


def _native(name: str) -> tuple[int, int]:
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        raise VizattnError(f"{name} has no native size: give one with --size.")
    _, height, width = cfg.input_size
    return height, width


def _comparison(
    name: str, mode: str, batch: int, size: tuple[int, int], dtype: str, variants: tuple[str, ...]
) -> list[Case]:
    members = [name, *filter(None, [peer_of(name)])]
    # The unit stays as the published times have it: never fused.
    units = dict.fromkeys("+".join(p for p in v.split("+") if p != "fuse") or "eager" for v in variants)
    pairs = [*((UNIT, unit) for unit in units), *((m, v) for m in members if m != UNIT for v in variants)]
    return [
        Case(
            group="backbones",
            subject=name,
            name=member,
            build=functools.partial(build, member, mode, batch, size, dtype, variant),
            mode=mode,
            batch=batch,
            size=text_of(size),
            dtype=dtype,
            variant=variant,
            reference=place == 0,
            ours=is_ours(member),
        )
        for place, (member, variant) in enumerate(pairs)
    ]
