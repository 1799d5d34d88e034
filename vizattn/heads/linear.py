"""The linear head: one 1x1 convolution over all maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vizattn.heads.conv import classifier
from vizattn.heads.resize import ratio, upsample

__all__ = ["Linear"]


class Linear(nn.Module):
    """A 1x1 convolution over the concatenation of all maps, resized to the finest.

    Convolution and resizing change places, for both are linear and the weights of resizing sum to one: each map is
    classified on its own grid, and num_classes channels are resized instead of all.

    Args:
        channels: Of the maps, finest first.
        strides: Of the maps, in pixels of the image.
        num_classes: Channels of the output.
    """

    pyramid: ClassVar[bool] = False

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.in_indices = tuple(range(len(channels)))
        self.stride = strides[0]
        self.factors = [ratio(stride, strides[0]) for stride in strides]
        self.convs = nn.ModuleList(classifier(dim, num_classes, bias=i == 0) for i, dim in enumerate(channels))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first -> logits (B, num_classes, h, w) on the grid of the finest."""
        logits = self.convs[0](maps[0])
        size = logits.shape[-2:]
        for conv, x, factor in zip(self.convs[1:], maps[1:], self.factors[1:], strict=True):
            logits = logits + upsample(conv(x), factor, size)
        return logits
