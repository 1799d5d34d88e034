"""How neighborhood attention is computed: tiles of queries against the keys that any query of the tile sees.

Along one axis of length L with dilation d the positions fall into d residue classes that never see each other, and each
class is cut into tiles. All tiles have the same number of queries and of keys, so attention becomes products of dense
matrices, as many as tiles; a table of position biases, minus infinity outside each query's window, selects the window.
Tiles differ in that table at borders only: one is kept for each distinct pattern. More axes are the product of one.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, M = E + N, h heads, d channels a head, T tiles, q
queries and s keys (extra ones first) of a tile, P patterns. Tokens come as ``qkv`` (B, M, 3, h, d), extra ones first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Axis", "attend_naive", "attend_plain", "attend_tiles"]

#: Scores worked on at once: few enough to stay in the cache of a core, many enough to hide the cost of a call.
CHUNK = 1 << 17
#: Numbers in the copy of the keys of the images worked on at once, for the same reasons.
GROUP = 1 << 20


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


def _tile(axis: Axis, axes: int) -> tuple[int, int, int]:
    """Tiles of a residue class, queries of a tile, keys of a tile: the fewest scores.

    Tiles are not made smaller than half a window, which bounds the copies of a key, and hold some queries.
    """
    longest = -(-axis.length // axis.dilation)
    smallest = max((32, 4, 3)[axes - 1], -(-axis.kernel // 2))
    best = (0, 0, 0)
    for size in [*range(smallest, 2 * smallest + 1), longest]:
        size = min(size, longest)
        count = -(-longest // size)
        keys = 1
        for length in (longest, axis.length // axis.dilation):
            for first in range(0, length, size):
                start = start_end(axis, first, length)[0]
                end = start_end(axis, min(first + size, length) - 1, length)[1]
                keys = max(keys, end - start)
        if not best[0] or count * size * (keys + 2) < best[0] * best[1] * (best[2] + 2):
            best = (count, size, keys)
    return best


def _axis_tiles(axis: Axis, axes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions (T, q) of the queries and whether each is its first occurrence; of the keys (T, s); whether a query
    sees a key (T, q, s); its entry in the table of biases (T, q, s)."""
    count, size, keys = _tile(axis, axes)
    group = torch.arange(axis.dilation, device=device).view(-1, 1, 1)
    length = (axis.length - 1 - group) // axis.dilation + 1
    j = torch.arange(count * size, device=device).view(1, count, size)
    fresh = j < length
    j = torch.minimum(j, length - 1)  # what is left of the last tile repeats its last query
    start, end = start_end(axis, j, length)
    first = torch.minimum(start.amin(-1, keepdim=True), (length - keys).clamp(min=0))
    t = first + torch.arange(keys, device=device)
    sees = (t.unsqueeze(2) >= start.unsqueeze(3)) & (t.unsqueeze(2) < end.unsqueeze(3))
    offset = (t.unsqueeze(2) - j.unsqueeze(3) + axis.reach).clamp(0, 2 * axis.reach)
    key = group + axis.dilation * torch.minimum(t, length - 1)  # what a short class lacks is never seen
    query = group + axis.dilation * j
    return query.flatten(0, 1), fresh.flatten(0, 1), key.flatten(0, 1), sees.flatten(0, 1), offset.flatten(0, 1)


def _outer(a: Tensor, b: Tensor, dims: int) -> Tensor:
    """The sums of all pairs, along each of the `dims` leading dimensions: (A1, A2), (B1, B2) -> (A1 B1, A2 B2)."""
    for dim in range(dims):
        a, b = a.unsqueeze(2 * dim + 1), b.unsqueeze(2 * dim)
    out = a + b
    for dim in range(dims):
        out = out.flatten(dim, dim + 1)
    return out


class _Tiles(NamedTuple):
    query: Tensor  # (T, q) token of the grid
    fresh: Tensor  # (T, q) whether the query is no repetition
    key: Tensor  # (T, s) token, extra ones first
    sees: Tensor  # (P, q, s)
    entry: Tensor  # (P, q, s) entry in the flattened table of biases
    pattern: Tensor  # (T,) which of the P
    place: Tensor  # (N,) position in the flattened `query`


def _tiles(axes: tuple[Axis, ...], extra: int, device: torch.device, distinct: bool) -> _Tiles:
    """The tiles of a grid; without `distinct` every tile has a pattern of its own (no values decide shapes then)."""
    parts = []
    for axis in axes:
        query, fresh, key, sees, offset = _axis_tiles(axis, len(axes), device)
        pattern = torch.arange(len(query), device=device)
        if distinct:
            both, pattern = torch.where(sees, offset, -1).unique(dim=0, return_inverse=True)
            sees, offset = both >= 0, both.clamp(min=0)
        parts.append((query, fresh, key, sees, offset, pattern))
    query, fresh, key, sees, entry, pattern = parts[0]
    for axis, (query1, fresh1, key1, sees1, offset1, pattern1) in zip(axes[1:], parts[1:]):
        pattern = _outer(pattern * len(sees1), pattern1, 1)
        query = _outer(query * axis.length, query1, 2)
        fresh = _outer(fresh.int(), fresh1.int(), 2) == 2
        key = _outer(key * axis.length, key1, 2)
        sees = _outer(sees.int(), sees1.int(), 3) == 2
        entry = _outer(entry * (2 * axis.reach + 1), offset1, 3)
    if extra:
        key = torch.cat([torch.arange(extra, device=device).expand(len(key), -1), key + extra], dim=1)
        sees, entry = F.pad(sees, (extra, 0), value=True), F.pad(entry, (extra, 0), value=0)
    tokens = math.prod([axis.length for axis in axes])
    order = torch.where(fresh, query, tokens).flatten()
    place = order.argsort()[:tokens]
    return _Tiles(query, fresh, key, sees, entry, pattern, place)


class _Tables(NamedTuple):
    tiles: _Tiles
    padded: bool
    mask: Tensor  # (P, q * s) zero where seen, minus infinity elsewhere
    biased: Tensor  # places in the flattened (P, q, s) that have a bias
    entry: Tensor  # their entries in the flattened table of biases
    entry_order: Tensor  # sorts `entry`
    entry_start: Tensor  # (entries of the table,) where each begins in the sorted order
    key_order: Tensor  # places in the flattened `key`, sorted by token
    key_start: Tensor  # (E + N,) where each token begins in it


def _sorted(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What sorts `values`, and where each of 0 ... count - 1 begins among the sorted."""
    ends = torch.bincount(values, minlength=count).cumsum(0)
    return values.argsort(stable=True), F.pad(ends[:-1], (1, 0))


@functools.lru_cache(maxsize=64)
def _tables(axes: tuple[Axis, ...], extra: int, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        tiles = _tiles(axes, extra, device, distinct=True)
        mask = torch.zeros(tiles.sees.shape, device=device).masked_fill_(~tiles.sees, -math.inf).flatten(1)
        has_bias = tiles.sees.clone()
        has_bias[..., :extra] = False
        biased = has_bias.flatten().nonzero().squeeze(1)
        entry = tiles.entry.flatten()[biased]
        entries = math.prod([2 * axis.reach + 1 for axis in axes])
        tokens = extra + math.prod([axis.length for axis in axes])
        return _Tables(
            tiles,
            not bool(tiles.fresh.all()),
            mask,
            biased,
            entry,
            *_sorted(entry, entries),
            *_sorted(tiles.key.flatten(), tokens),
        )


class _Rows(NamedTuple):
    """Rows of tensors seen as matrices (rows, d), for a group of images: qkv, tokens (B, N, h), tiles (T, B, h, n)."""

    query: Tensor  # (T, B, h, q) of qkv
    key: Tensor  # (T, B, h, s) of qkv; values lie h rows further
    token: Tensor  # (T, B, h, q) of tokens
    tile: Tensor  # (B, N, h) of tiles of queries
    bag: Tensor  # of tiles of keys, by image, head and token
    bag_start: Tensor  # (B * h * M,) where each begins in `bag`


@functools.lru_cache(maxsize=64)
def _rows(axes: tuple[Axis, ...], extra: int, device: torch.device, batch: int, heads: int) -> _Rows:
    with torch.inference_mode(False):
        tables = _tables(axes, extra, device)
        tiles = tables.tiles
        N, q, s = len(tiles.place), tiles.query.shape[1], tiles.key.shape[1]
        sample, head = torch.arange(batch, device=device), torch.arange(heads, device=device)

        def rows(tokens: Tensor, count: int, step: int) -> Tensor:
            first = sample.view(-1, 1, 1) * (count * step) + head.view(-1, 1)
            return (tokens * step).view(len(tokens), 1, 1, -1) + first

        def tile_rows(place: Tensor, n: int) -> Tensor:
            return place // n * (batch * heads * n) + place % n

        image = torch.arange(batch * heads, device=device)
        bag = tile_rows(tables.key_order, s) + image.view(-1, 1) * s
        return _Rows(
            rows(tiles.query + extra, extra + N, 3 * heads),
            rows(tiles.key, extra + N, 3 * heads) + heads,
            rows(tiles.query, N, heads),
            tile_rows(tiles.place, q).view(1, N, 1) + image.view(batch, 1, heads) * q,
            bag.flatten(),
            (tables.key_start + image.view(-1, 1) * len(tables.key_order)).flatten(),
        )


def _bias(tables: _Tables, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the scores begin with: (P, 1, h or 1, q * s)."""
    if rpb is None:
        return tables.mask.to(dtype).view(len(tables.mask), 1, 1, -1)
    bias = tables.mask.to(dtype).view(1, -1).repeat(len(rpb), 1)
    bias[:, tables.biased] = rpb.flatten(1)[:, tables.entry].to(dtype)
    return bias.view(len(rpb), len(tables.mask), -1).transpose(0, 1).contiguous().unsqueeze(1)


def _groups(qkv: Tensor, axes: tuple[Axis, ...]) -> Iterator[tuple[slice, _Tables, _Rows]]:
    """Some images at a time."""
    B, M, _, h, d = qkv.shape
    extra = M - math.prod([axis.length for axis in axes])
    tables = _tables(axes, extra, qkv.device)
    size = max(1, min(B, GROUP // (tables.tiles.key.numel() * h * d)))
    for begin in range(0, B, size):
        images = slice(begin, min(begin + size, B))
        yield images, tables, _rows(axes, extra, qkv.device, images.stop - begin, h)


def _chunks(
    qkv: Tensor, bias: Tensor, tables: _Tables, rows: _Rows, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Some tiles at a time: which, queries (n, q, d), keys (n, s, d), values (n, s, d), probabilities (n, q, s)."""
    B, _, _, h, d = qkv.shape
    T, q = tables.tiles.query.shape
    s = tables.tiles.key.shape[1]
    flat = qkv.reshape(-1, d)
    size = max(1, min(T, CHUNK // (B * h * q * s)))
    scores = qkv.new_empty(size, B, h, q * s)
    probabilities = torch.empty_like(scores)
    for begin in range(0, T, size):
        tiles = slice(begin, min(begin + size, T))
        n = tiles.stop - begin
        query = F.embedding(rows.query[tiles], flat).view(-1, q, d)
        key = F.embedding(rows.key[tiles], flat).view(-1, s, d)
        value = F.embedding(rows.key[tiles] + h, flat).view(-1, s, d)
        if B == 1 and bias.shape[2] == h:
            torch.index_select(bias, 0, tables.tiles.pattern[tiles], out=scores[:n])
        else:
            scores[:n] = bias[tables.tiles.pattern[tiles]]
        raw, p = scores[:n].view(-1, q, s), probabilities[:n].view(-1, q, s)
        raw.baddbmm_(query, key.transpose(1, 2), alpha=scale)
        torch.softmax(raw, dim=-1, out=p)
        yield tiles, query, key, value, p


class _Attend(torch.autograd.Function):
    """Scores exist for some tiles at a time, and again in the backward pass: memory is a few times that of qkv."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float) -> Tensor:
        B, _, _, h, d = qkv.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(B, math.prod([axis.length for axis in axes]), h, d)
        bias = None
        for images, tables, rows in _groups(qkv, axes):
            bias = _bias(tables, rpb, qkv.dtype) if bias is None else bias
            T, q = tables.tiles.query.shape
            tiled = qkv.new_empty(T, rows.tile.shape[0] * h, q, d)
            for tiles, _, _, value, p in _chunks(qkv[images], bias, tables, rows, scale):
                torch.bmm(p, value, out=tiled[tiles].view(-1, q, d))
            out[images] = F.embedding(rows.tile, tiled.view(-1, d))
        ctx.save_for_backward(qkv, rpb, out)
        ctx.axes, ctx.scale = axes, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # somebody may call backward inside autocast
            return _Attend._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        qkv, rpb, out = ctx.saved_tensors
        _, M, _, h, d = qkv.shape
        extra = M - out.shape[1]
        grad = grad.contiguous()
        # The mean of the scores' gradients under the probabilities, which the softmax takes off.
        mean = (grad * out).sum(-1).neg_()
        d_qkv = torch.empty_like(qkv)
        d_qkv[:, :extra, 0] = 0
        bias = d_bias = None
        for images, tables, rows in _groups(qkv, ctx.axes):
            T, q = tables.tiles.query.shape
            s = tables.tiles.key.shape[1]
            B = rows.tile.shape[0]
            if bias is None:
                bias = _bias(tables, rpb, qkv.dtype)
                if rpb is not None and ctx.needs_input_grad[1]:
                    d_bias = torch.zeros(len(bias), h, q * s, dtype=rpb.dtype, device=qkv.device)
            d_out, shift = F.embedding(rows.token, grad[images].view(-1, d)), mean[images].view(-1)[rows.token]
            if tables.padded:
                fresh = tables.tiles.fresh.view(T, 1, 1, q)
                d_out, shift = d_out * fresh.unsqueeze(-1), shift * fresh
            d_query = qkv.new_empty(T, B * h, q, d)
            d_key, d_value = qkv.new_empty(2, T, B * h, s, d)
            for tiles, query, key, value, p in _chunks(qkv[images], bias, tables, rows, ctx.scale):
                do = d_out[tiles].view(-1, q, d)
                torch.bmm(p.transpose(1, 2), do, out=d_value[tiles].view(-1, s, d))
                ds = torch.baddbmm(shift[tiles].view(-1, q, 1), do, value.transpose(1, 2)).mul_(p)
                torch.bmm(ds, key, out=d_query[tiles].view(-1, q, d))
                torch.bmm(ds.transpose(1, 2), query, out=d_key[tiles].view(-1, s, d))
                if d_bias is not None:
                    ds = ds.view(-1, B, h, q * s)
                    ds = ds[:, 0].to(d_bias.dtype) if B == 1 else ds.sum(1, dtype=d_bias.dtype)
                    d_bias.index_add_(0, tables.tiles.pattern[tiles], ds)
            d_qkv[images, extra:, 0] = F.embedding(rows.tile, d_query.mul_(ctx.scale).view(-1, d))
            for i, part in ((1, d_key), (2, d_value)):
                total = F.embedding_bag(rows.bag, part.view(-1, d), rows.bag_start, mode="sum")
                d_qkv[images, :, i] = total.mul_(ctx.scale if i == 1 else 1.0).view(B, h, M, d).transpose(1, 2)
        if d_bias is None:
            return d_qkv, None, None, None
        entries = d_bias.transpose(0, 1).reshape(h, -1)[:, tables.biased].t().contiguous()
        d_rpb = F.embedding_bag(tables.entry_order, entries, tables.entry_start, mode="sum")
        return d_qkv, d_rpb.t().reshape(rpb.shape), None, None


def attend_tiles(qkv: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float) -> Tensor:
    """Neighborhood attention by tiles, the fast path: qkv (B, E + N, 3, h, d) -> (B, N, h, d)."""
    with torch.autocast(qkv.device.type, enabled=False):
        return _Attend.apply(qkv, rpb, axes, scale)


def attend_plain(
    qkv: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, dropout_p: float = 0.0
) -> Tensor:
    """The same in plain operations, which compilers and exporters see through, and with dropout."""
    M, N = qkv.shape[1], math.prod([axis.length for axis in axes])
    tiles = _tiles(axes, M - N, qkv.device, distinct=False)
    T, q = tiles.query.shape
    s = tiles.key.shape[1]
    query = qkv[:, :, 0].index_select(1, tiles.query.flatten() + (M - N)).unflatten(1, (T, q)).transpose(2, 3)
    key, value = (
        qkv[:, :, i].index_select(1, tiles.key.flatten()).unflatten(1, (T, s)).transpose(2, 3) for i in (1, 2)
    )
    scores = query * scale @ key.transpose(-2, -1)
    if rpb is not None:
        bias = rpb.flatten(1)[:, tiles.entry].transpose(0, 1)
        if M > N:
            bias = F.pad(bias[..., M - N :], (M - N, 0))
        scores = scores + bias.to(scores.dtype)
    scores = scores.masked_fill(~tiles.sees.unsqueeze(1), -math.inf)
    out = F.dropout(scores.softmax(dim=-1), dropout_p) @ value
    return out.transpose(2, 3).flatten(1, 2).index_select(1, tiles.place)


def attend_naive(qkv: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float) -> Tensor:
    """The same with a copy of its keys and values for each query: slow, but its products are those of the papers."""
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
        key = _outer(key * axis.length, group.unsqueeze(1) + axis.dilation * t, 2)
        unseen = _outer(unseen, hidden.long(), 2)
        entry = _outer(entry * (2 * axis.reach + 1), t - j.unsqueeze(1) + axis.reach, 2)
    key = torch.cat([torch.arange(extra, device=device).expand(N, -1), key + extra], dim=1)
    query = qkv[:, extra:, 0].unsqueeze(3)  # (B, N, h, 1, d)
    keys, values = (qkv[:, :, i][:, key].transpose(2, 3) for i in (1, 2))  # (B, N, h, window, d)
    scores = query * scale @ keys.transpose(-2, -1)
    bias = scores.new_zeros(1, N, entry.shape[1]) if rpb is None else rpb.flatten(1)[:, entry].to(scores.dtype)
    bias = F.pad(bias.masked_fill(unseen > 0, -math.inf), (extra, 0))
    return ((scores + bias.transpose(0, 1).unsqueeze(2)).softmax(dim=-1) @ values).squeeze(3)
