"""The simple feature pyramid of ViTDet, arXiv:2203.16527: four maps from the last one of a plain ViT."""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = ["SimpleFeaturePyramid"]


class SimpleFeaturePyramid(nn.Module):
    """Transposed convolutions and pooling make the map finer and coarser; 1x1 and 3x3 convolutions bring all to `dim`.

    The paper's case is stride 16, which gives 4, 8, 16 and 32. In general the stride is halved twice at most, not below
    four pixels and only while it is even; there are always four maps, each twice as coarse as the one before.

    Args:
        in_dim: Channels of the map.
        stride: Of the map, in pixels of the image.
        dim: Channels of the pyramid.
    """

    def __init__(self, in_dim: int, stride: int, dim: int = 256) -> None:
        super().__init__()
        doublings = 0
        while doublings < 2 and stride % 2 == 0 and stride >= 8:
            stride //= 2
            doublings += 1
        self.channels = [dim] * 4
        self.strides = [stride * 2**i for i in range(4)]
        self.levels = nn.ModuleList(_level(in_dim, dim, doublings - i) for i in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_dim, h, w) -> four maps (B, dim, ., .), finest first."""
        return [level(x) for level in self.levels]


def _level(in_dim: int, dim: int, doublings: int) -> nn.Sequential:
    """From the map to one that is 2**doublings as fine."""
    layers: list[nn.Module] = []
    for i in range(doublings):
        layers += [LayerNorm2d(in_dim), nn.GELU()] if i else []
        layers.append(nn.ConvTranspose2d(in_dim, in_dim // 2, 2, stride=2))
        in_dim //= 2
    if doublings < 0:
        layers.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
    layers += [nn.Conv2d(in_dim, dim, 1, bias=False), LayerNorm2d(dim)]
    layers += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), LayerNorm2d(dim)]
    return nn.Sequential(*layers)
