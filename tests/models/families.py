"""The rows of the tests that every backbone passes: one a family, small enough to be run often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vizattn  # noqa: F401  (registers the backbones)


@dataclass(frozen=True)
class Family:
    """A family in the shared tests."""

    name: str
    """A registered name."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What makes it small."""
    strides: tuple[int, ...] = (4, 8, 16, 32)
    """Of the maps that `features_only` gives by default."""
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (64, 48), (33, 45), (20, 70))
    """Image sizes to try: native, divisible, odd, very oblong."""
    dynamic_size: bool = False
    """Whether `torch.export` can leave height and width open."""
    dynamic_onnx: bool = False
    """Whether ONNX can, too."""


FAMILIES: dict[str, Family] = {
    "agent_cswin": Family(
        "agent_cswin_tiny",
        {"img_size": 32, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4)}
        | {"num_agents": (4, 9), "split_size": 2},
    ),
    "agent_deit": Family("deit_agent_nano_patch4_32", {"depth": 3}, strides=(4, 4, 4), dynamic_size=True),
    "agent_pvt": Family(
        "agent_pvt_tiny",
        {"img_size": 32, "patch_size": 2, "embed_dims": (16, 32, 48), "depths": (1, 2, 1)}
        | {"num_heads": (1, 2, 3), "mlp_ratios": (4, 4, 2), "num_agents": (4, 9, 9), "out_indices": (0, 1, 2)},
        strides=(2, 4, 8),
    ),
    "agent_swin": Family(
        "agent_swin_tiny",
        {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 3, 2), "num_heads": (1, 2, 4)}
        | {"agent_blocks": (1, 1, 0), "num_agents": (4, 9, 9), "window_size": 3, "out_indices": (0, 1, 2)},
        strides=(2, 4, 8),
    ),
    "biformer": Family("biformer_nano", {"depths": (2, 1, 1)}, strides=(2, 4, 8)),
    "efficientvit": Family("efficientvit_va_nano", {"depths": (1, 1, 1)}, strides=(2, 4, 8)),
    "halonet": Family("halonet_va_nano", {"depths": (1, 2, 1)}, strides=(2, 4, 8)),
    "l2vit": Family("l2vit_nano", {"depths": (2, 1, 2)}, strides=(2, 4, 8)),
    "nat": Family("nat_nano", {"depths": (1, 2, 1), "dilations": 2}, strides=(2, 4, 8)),
    "vit": Family("vit_va_nano_patch4_32", {"depth": 3}, strides=(4, 4, 4), dynamic_size=True, dynamic_onnx=True),
}


def create(family: str, **kwargs: Any) -> nn.Module:
    """The small model of a family in eval mode; weights and statistics are not at their initial values."""
    row = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(row.name, **{"num_classes": 5, **row.kwargs, **kwargs})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "bias" in name or "token" in name or "pos_embed" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(1 + 0.1 * torch.rand_like(buffer))
    return model.eval()


def images(size: tuple[int, int], batch: int = 2, seed: int = 0) -> Tensor:
    """(batch, 3, height, width)."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
