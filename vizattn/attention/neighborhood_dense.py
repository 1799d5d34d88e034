"""Neighborhood attention on small maps: all tokens by all behind a mask, by torch's fused kernel.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, M = E + N, h heads, d channels a head.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.neighborhood_tiles import Axis, outer_sum, start_end

__all__ = ["attend_dense"]


@functools.lru_cache(maxsize=32)
def _entry(axes: tuple[Axis, ...], extra: int, device: torch.device) -> Tensor:
    """(N, M): of each query and key the entry in the flattened table of biases, after whose end come zero, for extra
    tokens, and minus infinity."""
    with torch.inference_mode(False):
        sees = entry = torch.zeros(1, 1, dtype=torch.long, device=device)
        for axis in axes:
            x = torch.arange(axis.length, device=device)
            group, j = x % axis.dilation, x // axis.dilation
            start, end = (t.unsqueeze(1) for t in start_end(axis, j, (axis.length - 1 - group) // axis.dilation + 1))
            unseen = (group.unsqueeze(1) != group) | (j < start) | (j >= end)
            offset = (j - j.unsqueeze(1) + axis.reach).clamp(0, 2 * axis.reach)
            sees = outer_sum(sees, unseen.long(), 2)
            entry = outer_sum(entry * (2 * axis.reach + 1), offset, 2)
        end = math.prod([2 * axis.reach + 1 for axis in axes])
        return F.pad(entry.masked_fill(sees > 0, end + 1), (extra, 0), value=end)


def attend_dense(
    rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Queries (B, N, h, d), keys and values (B, M, h, d), extra ones first -> (B, N, h, d)."""
    entry = _entry(axes, key.shape[1] - query.shape[1], query.device)
    end = math.prod([2 * axis.reach + 1 for axis in axes])
    table = query.new_zeros(1, end) if rpb is None else rpb.flatten(1).to(query.dtype)
    table = F.pad(F.pad(table, (0, 1)), (0, 1), value=-math.inf)
    mask = table.index_select(1, entry.flatten()).view(1, -1, *entry.shape)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
