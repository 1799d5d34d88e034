"""Attention in windows by the compiled library: no window is cut out, rolled or filled up.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, h heads, d channels a head; T windows of L tokens, on q
places, a multiple of `LANES`. A table of biases has offsets up to its own height and width, maybe a larger window's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.native import LANES
from vizattn.attention.tiles_native import Tiling, attend_tiles

__all__ = ["attend_windows"]


@functools.lru_cache(maxsize=64)
def _tiling(grid_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], extra: int) -> Tiling:
    """Each token has its place in its window; a window that ends at a border, or begins before it, has empty places."""
    with torch.inference_mode(False):
        windows, places = [], []
        for length, size, offset in zip(grid_size, window, shift):
            y = torch.arange(length, device="cpu") + (size - offset if offset else 0)
            windows.append(y // size)
            places.append(y % size)
        which = windows[0][:, None] * (int(windows[1][-1]) + 1) + windows[1]
        place = places[0][:, None] * window[1] + places[1]
        tokens = torch.full((int(which[-1, -1]) + 1, window[0] * window[1]), -1, dtype=torch.int32, device="cpu")
        tokens[which.flatten(), place.flatten()] = torch.arange(which.numel(), dtype=torch.int32, device="cpu")
        extras = torch.arange(extra, dtype=torch.int32, device="cpu").expand(len(tokens), -1)
        keys = torch.cat([extras, torch.where(tokens < 0, -1, tokens + extra)], dim=1)
        return Tiling(F.pad(tokens, (0, -tokens.shape[1] % LANES), value=-1), keys, None)


@functools.lru_cache(maxsize=64)
def _entries(table_size: tuple[int, int], window: tuple[int, int], extra: int) -> Tensor:
    """(E + L, q) int32: which offset of a table is that of a query and a key; the one after its end for extra keys."""
    with torch.inference_mode(False):
        y, x = (torch.arange(size, device="cpu") for size in window)
        dy, dx = y - y[:, None] + table_size[0] - 1, x - x[:, None] + table_size[1] - 1  # of query minus key
        entry = (dy[:, None, :, None] * (2 * table_size[1] - 1) + dx[:, None, :]).flatten(2).flatten(0, 1)
        end = (2 * table_size[0] - 1) * (2 * table_size[1] - 1)
        return F.pad(entry, (0, -entry.shape[1] % LANES, extra, 0), value=end).int()


def attend_windows(
    table: Tensor | None,
    table_size: tuple[int, int],
    grid_size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    *tokens: Tensor,
) -> Tensor:
    """Each token attends to its window and the extra tokens, with learnt biases of its window's offsets if any.

    The table of biases is ((2 * height - 1) * (2 * width - 1), h), by row and column of query minus key. `tokens` are
    qkv (B, E + N, 3, h, d), or queries (B, N, h, d), keys and values (B, E + N, h, d); -> (B, N, h, d).
    """
    N = grid_size[0] * grid_size[1]
    extra = tokens[-1].shape[1] - N
    bias = None
    if table is not None:
        entries = _entries(table_size, window, extra)
        bias = F.embedding(entries, F.pad(table.float(), (0, 0, 0, 1))).permute(2, 0, 1).unsqueeze(0)
    return attend_tiles(bias, _tiling(grid_size, window, shift, extra), scale, N, *tokens)
