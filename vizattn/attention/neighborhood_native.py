"""Neighborhood attention by the compiled library: each tile of queries attends to all keys that any of them sees.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, h heads, d channels a head; T tiles of q queries and s
keys, E of them extra; P distinct masks.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.native import LANES
from vizattn.attention.neighborhood_tiles import Axis, axis_tiles, outer_sum, tile_extent
from vizattn.attention.tiles_native import Tiling, attend_tiles

__all__ = ["attend_neighborhoods"]


@functools.lru_cache(maxsize=64)
def _sizes(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Queries of a tile along each axis: those that take the least time by what was measured."""
    choices = []
    for axis in axes:
        longest = -(-axis.length // axis.dilation)
        sizes = sorted({*range(1, min(longest, 32) + 1), longest})
        choices.append([(size, *tile_extent(axis, size), axis.dilation) for size in sizes])
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for tiling in itertools.product(*choices):
        queries, tiles, keys, classes = (math.prod([row[i] for row in tiling]) for i in range(4))
        cost = tiles * classes * (-(-queries // LANES) * (keys + 30) + 0.2 * keys)
        best = min(best, (cost, tuple([row[0] for row in tiling])))
    return best[1]


#: In a sum of places along axes, what makes it none.
_NONE = -(1 << 40)


class _Tables(NamedTuple):
    tiling: Tiling
    mask: Tensor  # (P, 1, E + s, q) zero where seen, minus infinity elsewhere
    entry: Tensor  # (P, E + s, q) in the flattened table of biases, after whose end come zero and minus infinity


@functools.lru_cache(maxsize=16)
def _tables(axes: tuple[Axis, ...], extra: int) -> _Tables:
    with torch.inference_mode(False):
        query = key = mask = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        entry = torch.zeros(1, 1, 1, dtype=torch.long, device="cpu")
        for axis, size in zip(axes, _sizes(axes)):
            tiles = axis_tiles(axis, size, torch.device("cpu"))
            # Tiles differ in what they see at borders only: each mask is kept once.
            seen, which = torch.where(tiles.sees, tiles.entry, _NONE).unique(dim=0, return_inverse=True)
            query = outer_sum(query * axis.length, torch.where(tiles.fresh, tiles.query, _NONE), 2)
            key = outer_sum(key * axis.length, tiles.key, 2)
            mask = outer_sum(mask * len(seen), which.view(-1, 1), 2)
            entry = outer_sum(entry * (2 * axis.reach + 1), seen, 3)

        end, more = math.prod([2 * axis.reach + 1 for axis in axes]), -query.shape[1] % LANES
        key = torch.cat([torch.arange(extra, device="cpu").expand(len(key), -1), key + extra], dim=1)
        entry = F.pad(entry.where(entry >= 0, end + 1), (0, more, extra, 0), value=end)
        return _Tables(
            Tiling(F.pad(query.clamp(min=-1), (0, more), value=-1).int(), key.int(), mask.flatten().int()),
            torch.zeros(entry.shape, dtype=torch.float32, device="cpu")
            .masked_fill_(entry > end, -math.inf)
            .unsqueeze(1),
            entry.int(),
        )


def attend_neighborhoods(rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, *tokens: Tensor) -> Tensor:
    """Neighborhood attention: qkv (B, E + N, 3, h, d), or queries (B, N, h, d), keys and values (B, E + N, h, d)
    -> (B, N, h, d)."""
    N = math.prod([axis.length for axis in axes])
    tables = _tables(axes, tokens[-1].shape[1] - N)
    bias = tables.mask
    if rpb is not None:
        table = F.pad(F.pad(rpb.flatten(1).t().float(), (0, 0, 0, 1)), (0, 0, 0, 1), value=-math.inf)
        bias = F.embedding(tables.entry, table).permute(0, 3, 1, 2)
    return attend_tiles(bias, tables.tiling, scale, N, *tokens)
