"""Side-tuning, arXiv:1912.13503: the frozen features and those of a small network, mixed by one learnt number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy
from vizattn.adapters.base import register
from vizattn.adapters.edits import Edits
from vizattn.errors import VizattnError

__all__ = ["SideTuning"]


@register("side_tuning")
@dataclass(frozen=True)
class SideTuning:
    """Side-tuning: sigmoid(a) * frozen features + (1 - sigmoid(a)) * Linear(small network)."""

    width: int = 64
    """Channels of the side network."""

    needs_anatomy: ClassVar[bool] = True
    mergeable: ClassVar[str] = "the side network is a second network"
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    composes_with: ClassVar[tuple[str, ...]] = ()
    cache_level: ClassVar[None] = None
    trains_backbone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise VizattnError(f"side_tuning: width must be at least 1, got {self.width}.")

    def attach(self, model: nn.Module, anatomy: Anatomy, edits: Edits) -> nn.Module:
        """Returns the side network."""
        return MixedFeatures(anatomy, getattr(model, "in_chans", 3), self.width)


class MixedFeatures(nn.Module):
    """A small convolutional network at the stride of the backbone's features, and the mixing number a."""

    def __init__(self, anatomy: Anatomy, in_chans: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(max(1, round(math.log2(anatomy.stride)))):
            conv = nn.Conv2d(in_chans if i == 0 else width, width, 3, 2, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.GELU()]
        self.side = nn.Sequential(*layers)
        self.channels_last = anatomy.channels_last
        self.proj = nn.Linear(width, anatomy.embed_dim)
        self.mix = nn.Parameter(torch.zeros(()))

    def side_map(self, image: Tensor, grid: Sequence[int]) -> Tensor:
        """Images to features (B, H, W, D) on the backbone's grid."""
        x = self.side(image)
        if tuple(x.shape[-2:]) != tuple(grid):
            x = F.interpolate(x, size=list(grid), mode="bilinear", align_corners=False)
        return self.proj(x.permute(0, 2, 3, 1))

    def blend(self, frozen: Tensor, side: Tensor) -> Tensor:
        """sigmoid(a) * frozen + (1 - sigmoid(a)) * side."""
        return torch.lerp(side.to(frozen.dtype), frozen, self.mix.sigmoid().to(frozen.dtype))

    def mix_into(self, model: Any, features: Tensor, image: Tensor, channels_last: bool) -> Tensor:
        """Mix tokens with prefix (B, P + N, D), patch tokens (B, N, D) or maps (B, D, H, W) with the side features."""
        if features.ndim == 4:
            side = self.side_map(image, features.shape[1:3] if channels_last else features.shape[2:])
            return self.blend(features, side if channels_last else side.permute(0, 3, 1, 2))
        side = self.side_map(image, model.patch_embed.dynamic_feat_size(image.shape[-2:])).flatten(1, 2)
        prefix = features.shape[1] - side.shape[1]
        return self.blend(features, torch.cat([side.mean(dim=1, keepdim=True).expand(-1, prefix, -1), side], dim=1))

    def forward_maps(self, model: Any, run: Callable[..., Any], x: Tensor) -> Any:
        """The maps of timm's list or dictionary of layers; those of the last one's width are mixed."""
        maps = run(x)
        if isinstance(maps, dict):
            return {name: self._mix_level(model, level, x, self.channels_last) for name, level in maps.items()}
        return [self._mix_level(model, level, x, self.channels_last) for level in maps]

    def forward_features(self, model: Any, run: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        """As the backbone's; prefix tokens are mixed with the mean of the side map."""
        return self.mix_into(model, run(x, **kwargs), x, self.channels_last)

    def forward_intermediates(self, model: Any, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own; every level of the last one's width is mixed."""
        out = run(x, *args, **kwargs)
        nhwc = kwargs.get("output_fmt") == "NHWC"
        if isinstance(out, dict):
            mixed: dict[str, Any] = dict(out)
            levels = out["image_intermediates"]
            mixed["image_intermediates"] = [self._mix_level(model, level, x, nhwc) for level in levels]
            if "image_features" in out:
                mixed["image_features"] = self.mix_into(model, out["image_features"], x, self.channels_last)
            return mixed
        if isinstance(out, list):
            return [self._mix_level(model, level, x, nhwc) for level in out]
        last = self.mix_into(model, out[0], x, self.channels_last)
        return last, [self._mix_level(model, level, x, nhwc) for level in out[1]]

    def _mix_level(self, model: Any, level: Any, x: Tensor, channels_last: bool) -> Any:
        if isinstance(level, tuple):  # with prefix tokens
            return (self._mix_level(model, level[0], x, channels_last), *level[1:])
        fits = level.shape[1 if level.ndim == 4 and not channels_last else -1] == self.proj.out_features
        return self.mix_into(model, level, x, channels_last) if fits else level
