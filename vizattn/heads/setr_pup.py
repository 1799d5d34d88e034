"""SETR with progressive upsampling, arXiv:2012.15840."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vizattn.heads.conv import ConvBnRelu, classifier

__all__ = ["SETRPUP"]


class SETRPUP(nn.Module):
    """3x3 convolutions on the last map in turn with upsampling by two, up to the resolution of the image.

    The last upsampling, from stride 2, is left to whoever resizes the logits: it changes places with the classifier,
    as in `Linear`, and is the same function. At stride 16 these are the paper's four convolutions.

    Args:
        channels: Of the maps, finest first.
        strides: Of the maps, in pixels of the image; upsampling ends early at a stride that is odd.
        num_classes: Channels of the output.
        dim: Width.
        drop_rate: Dropout of channels before the classifier.
    """

    pyramid: ClassVar[bool] = False

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        dim: int = 256,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_indices = (len(channels) - 1,)
        self.stride = strides[-1]
        layers: list[nn.Module] = [ConvBnRelu(channels[-1], dim, 3)]
        while self.stride > 2 and self.stride % 2 == 0:
            layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), ConvBnRelu(dim, dim, 3)]
            self.stride //= 2
        self.layers = nn.Sequential(*layers)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = classifier(dim, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first -> logits (B, num_classes, h, w) on a grid finer than the last map's."""
        return self.classifier(self.drop(self.layers(maps[-1])))
