"""The fully convolutional head, arXiv:1411.4038, in the form that is trained beside other heads (arXiv:1612.01105)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vizattn.heads.conv import ConvBnRelu, classifier

__all__ = ["FCN"]


class FCN(nn.Module):
    """A 3x3 convolution and the classifier on the last map.

    Args:
        channels: Of the maps, finest first.
        strides: Of the maps, in pixels of the image.
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
        self.conv = ConvBnRelu(channels[-1], dim, 3)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = classifier(dim, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first -> logits (B, num_classes, h, w) on the grid of the last."""
        return self.classifier(self.drop(self.conv(maps[-1])))
