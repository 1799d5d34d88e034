"""The parts that heads are made of: convolution, BatchNorm and ReLU; the last convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

__all__ = ["ConvBnRelu", "classifier"]


class ConvBnRelu(ConvNormAct):
    """`timm.layers.ConvNormAct` that also trains where a channel has a single value: batch 1, map 1x1.

    One value has no variance. It is normalised by the running statistics instead, which stay as they are: the function
    is that of evaluation. Maps pooled to 1x1 are such a case, and the last image of an epoch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        bn: Any = self.bn
        x = self.conv(x)
        # Synchronised norms, which are no BatchNorm2d, have the values of other processes.
        if self.training and isinstance(bn, nn.BatchNorm2d) and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return bn.act(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))  # type: ignore[operator]
        return bn(x)


def classifier(dim: int, num_classes: int, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution, (B, dim, H, W) -> (B, num_classes, H, W), whose first logits are close to zero."""
    conv = nn.Conv2d(dim, num_classes, 1, bias=bias)
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
