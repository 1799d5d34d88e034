"""Upsampling between the maps of a pyramid, whose position i at stride s covers the pixels i*s up to (i+1)*s."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vizattn.errors import VizattnError

__all__ = ["ratio", "upsample"]


def ratio(coarse: int, fine: int) -> int:
    """How many positions of stride `fine` one of stride `coarse` covers in a row.

    Raises:
        VizattnError: not a power of two.
    """
    factor = coarse // fine
    if coarse % fine or factor & (factor - 1):
        raise VizattnError(
            f"Each stride of a backbone's maps must be the one before times a power of two, got {fine} and {coarse}."
        )
    return factor


def upsample(x: Tensor, factor: int, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """A map `factor` times finer, (B, C, h, w) -> (B, C, *size); what lies beyond `size` is cut off.

    Sizes that do not divide are rounded up from level to level, so coarse maps reach beyond the image. Resizing by a
    whole factor keeps them in place, where resizing to `size` would squeeze them.
    """
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode=mode, align_corners=False if mode == "bilinear" else None)
    return x[..., : size[0], : size[1]]
