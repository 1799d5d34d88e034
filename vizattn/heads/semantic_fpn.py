"""Semantic FPN, from Panoptic Feature Pyramid Networks, arXiv:1901.02446."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from vizattn.heads.conv import ConvBnRelu, classifier
from vizattn.heads.resize import ratio, upsample

__all__ = ["SemanticFPN"]


class SemanticFPN(nn.Module):
    """A feature pyramid network, whose levels are brought to the finest grid in steps of two and added.

    Norms are BatchNorm, as in the results published for attention backbones; the paper has GroupNorm.

    Args:
        channels: Of the maps, finest first.
        strides: Of the maps, in pixels of the image.
        num_classes: Channels of the output.
        fpn_dim: Width of the feature pyramid network.
        dim: Width of the maps that are added.
        drop_rate: Dropout of channels before the classifier.
    """

    pyramid: ClassVar[bool] = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        fpn_dim: int = 256,
        dim: int = 128,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_indices = tuple(range(len(channels)))
        self.stride = strides[0]
        self.factors = [ratio(coarse, fine) for fine, coarse in pairwise(strides)]
        self.laterals = nn.ModuleList(nn.Conv2d(c, fpn_dim, 1) for c in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(fpn_dim, fpn_dim, 3, padding=1) for _ in channels)
        self.scales = nn.ModuleList(_scale(fpn_dim, dim, ratio(stride, strides[0])) for stride in strides)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = classifier(dim, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first -> logits (B, num_classes, h, w) on the grid of the finest."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + upsample(maps[i], self.factors[i - 1], maps[i - 1].shape[-2:], "nearest")
        size = maps[0].shape[-2:]
        total = self.scales[0](self.outputs[0](maps[0]))
        for scale, output, x in zip(self.scales[1:], self.outputs[1:], maps[1:]):
            total = total + upsample(scale(output(x)), 1, size)
        return self.classifier(self.drop(total))


def _scale(in_dim: int, dim: int, factor: int) -> nn.Sequential:
    """Convolutions, each followed by upsampling by two, until the map is `factor` times finer."""
    layers: list[nn.Module] = [ConvBnRelu(in_dim, dim, 3)]
    for i in range(factor.bit_length() - 1):
        if i:
            layers.append(ConvBnRelu(dim, dim, 3))
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
