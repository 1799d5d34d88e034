"""Neighborhood attention in plain operations: by tiles, which compilers see through, and by its definition.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, M = E + N, h heads, d channels a head, T tiles, q
queries and s keys of a tile. Tokens come as ``qkv`` (B, M, 3, h, d), extra ones first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.neighborhood_tiles import Axis, outer_sum, product, start_end, tile_extent

__all__ = ["attend_naive", "attend_plain"]


def _tile_size(axis: Axis, axes: int) -> int:
    """Queries of a tile along one of so many axes: the fewest scores.

    Tiles are not made smaller than half a window, which bounds the copies of a key, and hold some queries.
    """
    longest = -(-axis.length // axis.dilation)
    smallest = max((32, 4, 3)[axes - 1], -(-axis.kernel // 2))
    best = fewest = 0
    for size in [*range(smallest, 2 * smallest + 1), longest]:
        size = min(size, longest)
        count, keys = tile_extent(axis, size)
        if not best or count * size * (keys + 2) < fewest:
            best, fewest = size, count * size * (keys + 2)
    return best


def attend_plain(
    qkv: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Neighborhood attention by tiles, (B, E + N, 3, h, d) -> (B, N, h, d); keys are copied for each tile."""
    N = math.prod([axis.length for axis in axes])
    extra = qkv.shape[1] - N
    tiles = product(axes, tuple([_tile_size(axis, len(axes)) for axis in axes]), qkv.device)
    (T, q), s = tiles.query.shape, tiles.key.shape[1]
    query = qkv[:, extra:, 0].index_select(1, tiles.query.flatten()).unflatten(1, (T, q)).transpose(2, 3)
    seen = torch.cat([torch.arange(extra, device=qkv.device).expand(T, -1), tiles.key + extra], dim=1)
    key, value = (
        qkv[:, :, i].index_select(1, seen.flatten()).unflatten(1, (T, extra + s)).transpose(2, 3) for i in (1, 2)
    )
    scores = query * scale @ key.transpose(-2, -1)
    if rpb is not None:
        bias = rpb.flatten(1)[:, tiles.entry.transpose(1, 2)].transpose(0, 1)
        scores = scores + F.pad(bias, (extra, 0)).to(scores.dtype)
    unseen = F.pad(~tiles.sees.transpose(1, 2), (extra, 0))
    scores = scores.masked_fill(unseen.unsqueeze(1), -math.inf)
    out = F.dropout(scores.softmax(dim=-1), dropout_p) @ value
    place = torch.where(tiles.fresh, tiles.query, N).flatten().argsort()[:N]
    return out.transpose(2, 3).flatten(1, 2).index_select(1, place)


def attend_naive(qkv: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float) -> Tensor:
    """Neighborhood attention with a copy of its keys and values for each query: slow; its products are the papers'."""
    N = math.prod([axis.length for axis in axes])
    extra = qkv.shape[1] - N
    device = qkv.device
    key = torch.zeros(1, 1, dtype=torch.long, device=device)
    unseen, entry = torch.zeros_like(key), torch.zeros_like(key)
    for axis in axes:
        x = torch.arange(axis.length, device=device)
        group, j = x % axis.dilation, x // axis.dilation
        start, end = start_end(axis, j, (axis.length - 1 - group) // axis.dilation + 1)
        t = start.unsqueeze(1) + torch.arange(axis.kernel, device=device)
        hidden = t >= end.unsqueeze(1)
        t = torch.where(hidden, start.unsqueeze(1), t)
        key = outer_sum(key * axis.length, group.unsqueeze(1) + axis.dilation * t, 2)
        unseen = outer_sum(unseen, hidden.long(), 2)
        entry = outer_sum(entry * (2 * axis.reach + 1), t - j.unsqueeze(1) + axis.reach, 2)
    key = torch.cat([torch.arange(extra, device=device).expand(N, -1), key + extra], dim=1)
    query = qkv[:, extra:, 0].unsqueeze(3)  # (B, N, h, 1, d)
    keys, values = (qkv[:, :, i][:, key].transpose(2, 3) for i in (1, 2))  # (B, N, h, window, d)
    scores = query * scale @ keys.transpose(-2, -1)
    bias = scores.new_zeros(1, N, entry.shape[1]) if rpb is None else rpb.flatten(1)[:, entry].to(scores.dtype)
    bias = F.pad(bias.masked_fill(unseen > 0, -math.inf), (extra, 0))
    return ((scores + bias.transpose(0, 1).unsqueeze(2)).softmax(dim=-1) @ values).squeeze(3)
