"""Attention of regions to the regions they are routed to, by the compiled library: no key is copied.

Shapes: B batch, h heads, d channels a head; H x W patch tokens in R regions of L tokens; P prefix tokens, G keys before
the map.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.native import LANES
from vizattn.attention.tiles_native import Tiling, attend_tiles

__all__ = ["attend_regions"]


@functools.lru_cache(maxsize=32)
def _tokens(grid_size: tuple[int, int], region_size: tuple[int, int], G: int) -> tuple[Tensor, Tensor]:
    """Int32: queries of each region (R, L and up to a multiple of `LANES`), and keys (R, L); -1 for none, as where a
    region sticks out of the map."""
    (H, W), (rows, columns) = grid_size, region_size
    with torch.inference_mode(False):
        tokens = torch.arange(H * W, dtype=torch.int32, device="cpu").view(H, W)
        tokens = F.pad(tokens, (0, -W % columns, 0, -H % rows), value=-1)
        tokens = tokens.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2).flatten(0, 1)
        return F.pad(tokens, (0, -tokens.shape[1] % LANES), value=-1), torch.where(tokens < 0, -1, tokens + G)


def attend_regions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routed: Tensor,
    grid_size: tuple[int, int],
    region_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """Queries (B, h, H * W, d), keys and values (B, h, G + H * W, d), `routed` (B, R, topk) -> (B, h, H * W, d)."""
    N = query.shape[2]
    G = key.shape[2] - N
    query_at, keys = _tokens(grid_size, region_size, G)
    key_at = keys[routed].flatten(2)
    key_at = torch.cat([torch.arange(G, dtype=torch.int32, device="cpu").expand(*key_at.shape[:2], -1), key_at], dim=2)
    tiling = Tiling(query_at, key_at, None)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend_tiles(None, tiling, scale, N, query, key, value).transpose(1, 2)
