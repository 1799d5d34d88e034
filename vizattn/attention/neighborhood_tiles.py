"""Where neighborhoods lie: tiles of queries, and the keys that any query of a tile sees.

Along one axis of length L with dilation d the positions fall into d residue classes that never see each other. In the
order of their classes the keys of a tile are one slice. All tiles have the same number of queries and of keys, so
attention becomes products of dense matrices, as many as tiles; what a query does not see of them is masked. Several
axes are the product of one.

Shapes: L positions, T tiles, q queries and s keys of a tile.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Axis",
    "Tiles",
    "axis_tiles",
    "outer_sum",
    "product",
    "start_end",
    "tile_extent",
    "tile_scores",
    "tile_sizes",
]


class Axis(NamedTuple):
    """Neighborhoods along one axis."""

    length: int
    kernel: int
    stride: int
    dilation: int
    causal: bool
    #: Offset 0 in the table of biases; the table has twice as many entries, less one.
    reach: int


def start_end(axis: Axis, j: Any, length: Any) -> tuple[Any, Any]:
    """First key and end of the keys of query `j`, both counted within its residue class of `length` positions."""
    tensors = isinstance(j, Tensor)
    low: Any = torch.minimum if tensors else min
    high: Any = torch.maximum if tensors else max
    zero = torch.zeros_like(j) if tensors else 0
    leader = j // axis.stride * axis.stride
    if axis.causal:
        leader = low(leader + axis.stride - 1, length - 1)
        return high(leader - axis.kernel + 1, zero), j + 1
    leader = low(leader + axis.stride // 2, length - 1)
    start = low(high(leader - axis.kernel // 2, zero), length - axis.kernel)
    return start, start + axis.kernel


def tile_extent(axis: Axis, size: int) -> tuple[int, int]:
    """Tiles of `size` queries in a residue class, and keys of such a tile."""
    longest, keys = -(-axis.length // axis.dilation), 1
    for length in {longest, axis.length // axis.dilation}:
        for first in range(0, length, size):
            end = start_end(axis, min(first + size, length) - 1, length)[1]
            keys = max(keys, end - start_end(axis, first, length)[0])
    return -(-longest // size), keys


@functools.lru_cache(maxsize=64)
def tile_sizes(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Queries of a tile along each axis: those that take the least time by what was measured on a CPU.

    Scores cost least where queries come by 16 or 32; to gather a key costs as much as some scores; and rows of tiles,
    along the first axis, are worked on one after the other. Tiles along the others are not smaller than half a window,
    or a key would be gathered too often.
    """
    choices = []
    for number, axis in enumerate(axes):
        longest = -(-axis.length // axis.dilation)
        smallest = min(-(-axis.kernel // 2), longest) if number else 1
        sizes = sorted({*range(smallest, max(smallest, min(longest, 32)) + 1), longest})
        choices.append(
            [(size, axis.dilation * count, keys) for size in sizes for count, keys in [tile_extent(axis, size)]]
        )

    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for tiling in itertools.product(*choices):
        queries, tiles, keys = (math.prod([row[i] for row in tiling]) for i in range(3))
        score = 5.5 + 16 / queries + (0.4 if queries % 16 else 0)
        nanoseconds = tiles * (keys * (queries * score + 40) + 3_000) + tiling[0][1] * 20_000
        best = min(best, (nanoseconds, tuple([row[0] for row in tiling])))
    return best[1]


@functools.lru_cache(maxsize=64)
def tile_scores(axes: tuple[Axis, ...]) -> int:
    """Scores of all tiles together."""
    extents = [tile_extent(axis, size) for axis, size in zip(axes, tile_sizes(axes))]
    return math.prod(
        axis.dilation * count * size * keys for axis, size, (count, keys) in zip(axes, tile_sizes(axes), extents)
    )


class Tiles(NamedTuple):
    """Tiles along one axis, or their product along several."""

    query: Tensor  # (T, q) position
    fresh: Tensor  # (T, q) whether the query is no repetition
    key: Tensor  # (T, s) position
    start: Tensor  # (T,) of the first key in `order`, where the others follow it; of one axis only
    order: Tensor  # (L,) positions by residue class; of one axis only
    sees: Tensor  # (T, s, q) whether the key is seen by the query
    entry: Tensor  # (T, s, q) in the flattened table of biases


def axis_tiles(axis: Axis, size: int, device: torch.device) -> Tiles:
    """Tiles of `size` queries; what is left of the last tile of a class repeats its last query."""
    count, keys = tile_extent(axis, size)
    group = torch.arange(axis.dilation, device=device).view(-1, 1, 1)
    length = (axis.length - 1 - group) // axis.dilation + 1
    before = length.cumsum(0) - length  # positions in earlier classes
    j = torch.arange(count * size, device=device).view(1, count, size)
    fresh = j < length
    j = torch.minimum(j, length - 1)
    begin, end = start_end(axis, j, length)
    start = (before + begin.amin(-1, keepdim=True)).clamp(max=axis.length - keys)
    place = start + torch.arange(keys, device=device)
    t, j4 = (place - before).unsqueeze(3), j.unsqueeze(2)  # beyond its class, `t` is no key of any query
    sees = (t >= begin.unsqueeze(2)) & (t < end.unsqueeze(2))
    entry = (t - j4 + axis.reach).clamp(0, 2 * axis.reach)
    position = torch.arange(axis.length, device=device)
    order = (position % axis.dilation * axis.length + position // axis.dilation).argsort()
    query = group + axis.dilation * j
    return Tiles(
        query.flatten(0, 1),
        fresh.flatten(0, 1),
        order[place].flatten(0, 1),
        start.flatten(),
        order,
        sees.flatten(0, 1),
        entry.flatten(0, 1),
    )


def outer_sum(a: Tensor, b: Tensor, dims: int) -> Tensor:
    """The sums of all pairs, along each of the `dims` leading dimensions: (A1, A2), (B1, B2) -> (A1 B1, A2 B2)."""
    for dim in range(dims):
        a, b = a.unsqueeze(2 * dim + 1), b.unsqueeze(2 * dim)
    out = a + b
    for dim in range(dims):
        out = out.flatten(dim, dim + 1)
    return out


def product(axes: tuple[Axis, ...], sizes: tuple[int, ...], device: torch.device) -> Tiles:
    """The tiles of a grid, the last axis running fastest in tiles, queries, keys and positions."""
    tiles = axis_tiles(axes[0], sizes[0], device)
    for axis, size in zip(axes[1:], sizes[1:]):
        more = axis_tiles(axis, size, device)
        tiles = Tiles(
            outer_sum(tiles.query * axis.length, more.query, 2),
            outer_sum(tiles.fresh.int(), more.fresh.int(), 2) == 2,
            outer_sum(tiles.key * axis.length, more.key, 2),
            tiles.start,
            tiles.order,
            outer_sum(tiles.sees.int(), more.sees.int(), 3) == 2,
            outer_sum(tiles.entry * (2 * axis.reach + 1), more.entry, 3),
        )
    return tiles
