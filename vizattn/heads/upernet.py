"""UPerNet, unified perceptual parsing, arXiv:1807.10221; its pyramid pooling is that of PSPNet, arXiv:1612.01105."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn.heads.conv import ConvBnRelu, classifier
from vizattn.heads.resize import ratio, upsample

__all__ = ["PyramidPooling", "UPerNet"]


class PyramidPooling(nn.Module):
    """Averages over grids of few cells, brought back to the map and joined with it, (B, C, h, w) -> (B, dim, h, w)."""

    def __init__(self, in_dim: int, dim: int, pool_scales: Sequence[int]) -> None:
        super().__init__()
        self.pool_scales = tuple(pool_scales)
        self.convs = nn.ModuleList(ConvBnRelu(in_dim, dim, 1) for _ in self.pool_scales)
        self.bottleneck = ConvBnRelu(in_dim + dim * len(self.pool_scales), dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for scale, conv in zip(self.pool_scales, self.convs):
            pooled = conv(F.adaptive_avg_pool2d(x, scale))
            parts.append(F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.bottleneck(torch.cat(parts, dim=1))


class UPerNet(nn.Module):
    """Pyramid pooling on the last map, a feature pyramid network below it, all levels joined on the finest grid.

    Args:
        channels: Of the maps, finest first.
        strides: Of the maps, in pixels of the image.
        num_classes: Channels of the output.
        dim: Width.
        pool_scales: Cells along each side of the grids of the pyramid pooling.
        drop_rate: Dropout of channels before the classifier.
    """

    pyramid: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        dim: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_indices = tuple(range(len(channels)))
        self.stride = strides[0]
        self.steps = [ratio(coarse, fine) for fine, coarse in pairwise(strides)]
        self.factors = [ratio(stride, strides[0]) for stride in strides]
        self.pooling = PyramidPooling(channels[-1], dim, pool_scales)
        self.laterals = nn.ModuleList(ConvBnRelu(c, dim, 1) for c in channels[:-1])
        self.outputs = nn.ModuleList(ConvBnRelu(dim, dim, 3) for _ in channels[:-1])
        self.bottleneck = ConvBnRelu(dim * len(channels), dim, 3)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = classifier(dim, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first -> logits (B, num_classes, h, w) on the grid of the finest."""
        maps = [*(lateral(x) for lateral, x in zip(self.laterals, maps)), self.pooling(maps[-1])]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + upsample(maps[i], self.steps[i - 1], maps[i - 1].shape[-2:])
        maps = [*(output(x) for output, x in zip(self.outputs, maps)), maps[-1]]
        size = maps[0].shape[-2:]
        joined = torch.cat([upsample(x, factor, size) for x, factor in zip(maps, self.factors, strict=True)], dim=1)
        return self.classifier(self.drop(self.bottleneck(joined)))
