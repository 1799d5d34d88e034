"""How neighborhood attention is computed: products of dense matrices, a row of tiles at a time, forward and backward.

Keys and values are copied once for each column of tiles that sees them; along the first axis the keys of a tile are a
slice of that copy. Scores exist for one row of tiles at a time, and again in the backward pass, which needs only their
logarithms of sums: memory is a few times that of the tokens. Scores are kept by key, then query, as these products are
faster.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, M = E + N, h heads, d channels a head; a grid has T0
rows of T1 tiles; q = q0 q1 queries and s = s0 s1 keys of a tile, R positions along the first axis; P rows and Q columns
of distinct masks. Tokens come as ``qkv`` (B, M, 3, h, d), or as queries (B, N, h, d), keys and values (B, M, h, d);
extra ones first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.neighborhood_tiles import Axis, axis_tiles, product, tile_sizes

__all__ = ["attend_fused"]

#: Scores worked on at once: few enough to stay in the cache of a core, many enough to hide the cost of a call.
CHUNK = 1 << 17

#: Maps whose tables are kept: those of a large one are tens of megabytes.
KEPT = 32

#: Exponentials are of base 2: those of base e are many times slower where they underflow, as behind a mask.
LOG2_E = math.log2(math.e)

#: What one axis is multiplied by, to have a first one.
_NO_AXIS = Axis(1, 1, 1, 1, False, 0)


class _Tables(NamedTuple):
    start: list[int]  # (T0,) first position of the keys of each row of tiles
    row_keys: int  # s0
    mask_row: list[int]  # (T0,) which of the P
    mask_column: Tensor  # (T1,) which of the Q
    mask: Tensor  # (P, Q, E + s, q) zero where seen, minus infinity elsewhere
    entry: Tensor  # the same in the flattened table of biases, after whose end come zero and minus infinity
    entry_order: Tensor  # places in the flattened `entry`, sorted by entry of the table
    entry_start: Tensor  # (entries of the table,) where each begins in it
    query: Tensor  # (T0, T1, q) token of the grid
    fresh: Tensor | None  # (T0, T1, q) whether the query is no repetition; None if none is
    key: Tensor  # (T1, R, s1) token of the grid
    place: Tensor  # (N,) position in the flattened `query`


def _sorted(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What sorts `values`, and where each of 0 ... count - 1 begins among the sorted."""
    ends = torch.bincount(values, minlength=count).cumsum(0)
    return values.argsort(stable=True), F.pad(ends[:-1], (1, 0))


@functools.lru_cache(maxsize=KEPT)
def _tables(axes: tuple[Axis, ...], extra: int, device: torch.device) -> _Tables:
    axes = axes if len(axes) > 1 else (_NO_AXIS, *axes)
    with torch.inference_mode(False):
        sizes = tile_sizes(axes)
        rows, columns = axis_tiles(axes[0], sizes[0], device), product(axes[1:], sizes[1:], device)
        inner = math.prod([axis.length for axis in axes[1:]])
        entries = math.prod([2 * axis.reach + 1 for axis in axes[1:]])

        # Tiles differ in what they see at borders only: one mask is kept for each distinct row and column.
        outer, mask_row = torch.where(rows.sees, rows.entry, -1).unique(dim=0, return_inverse=True)
        within, mask_column = torch.where(columns.sees, columns.entry, -1).unique(dim=0, return_inverse=True)
        outer, within = outer[:, None, :, None, :, None], within[None, :, None, :, None, :]
        sees = ((outer >= 0) & (within >= 0)).flatten(4).flatten(2, 3)
        entry = (outer * entries + within).flatten(4).flatten(2, 3)
        end = (2 * axes[0].reach + 1) * entries
        entry = F.pad(entry.masked_fill(~sees, end + 1), (0, 0, extra, 0), value=end)
        order, first = _sorted(entry.flatten(), end + 2)
        mask = torch.zeros(entry.shape, device=device).masked_fill_(entry > end, -math.inf)

        query = (rows.query * inner)[:, None, :, None] + columns.query[None, :, None, :]
        fresh = (rows.fresh[:, None, :, None] & columns.fresh[None, :, None, :]).flatten(2)
        query = query.flatten(2)
        place = torch.where(fresh, query, axes[0].length * inner).flatten().argsort()[: axes[0].length * inner]
        return _Tables(
            rows.start.tolist(),
            rows.key.shape[1],
            mask_row.tolist(),
            mask_column,
            mask,
            entry,
            order[: int(first[end])],
            first[:end],
            query,
            None if bool(fresh.all()) else fresh,
            rows.order.view(1, -1, 1) * inner + columns.key.unsqueeze(1),
            place,
        )


class _Rows(NamedTuple):
    """Rows of tensors seen as matrices (rows, d), for some images at a time."""

    query: Tensor  # (T0, T1, B, h, q) of queries
    key: Tensor  # (T1, B, h, R, s1) of keys or values
    token: Tensor  # (T0, T1, B, h, q) of outputs (B, N, h)
    tile: Tensor  # (B, N, h) of tiles of queries
    bag: Tensor  # of the copies of keys, by image, token of the grid and head
    bag_start: Tensor  # (B * N * h,) where each begins in `bag`


@functools.lru_cache(maxsize=KEPT)
def _rows(axes: tuple[Axis, ...], extra: int, device: torch.device, batch: int, heads: int, packed: bool) -> _Rows:
    with torch.inference_mode(False):
        tables = _tables(axes, extra, device)
        N, q = len(tables.place), tables.query.shape[-1]
        image, head = torch.arange(batch, device=device).view(-1, 1, 1), torch.arange(heads, device=device).view(-1, 1)
        step = 3 * heads if packed else heads

        def rows(tokens: Tensor, count: int, step: int) -> Tensor:
            return image * (count * step) + tokens.flatten(-1)[..., None, None, :] * step + head

        copies = rows(tables.key.flatten(1), N, heads)
        tile = tables.place // q * (batch * heads * q) + tables.place % q
        before = extra if packed else 0
        return _Rows(
            rows(tables.query + before, before + N, step),
            rows(tables.key.flatten(1) + extra, extra + N, step),
            rows(tables.query, N, heads),
            tile.view(1, N, 1) + (image * heads + torch.arange(heads, device=device)) * q,
            *_sorted(copies.flatten(), batch * N * heads),
        )


def _bias(tables: _Tables, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What scores in base 2 begin with: (P, Q, h or 1, E + s, q)."""
    if rpb is None:
        return tables.mask.to(dtype).unsqueeze(2)
    table = F.pad(F.pad(rpb.flatten(1).to(dtype) * LOG2_E, (0, 1)), (0, 1), value=-math.inf)
    return table.index_select(1, tables.entry.flatten()).view(-1, *tables.entry.shape).permute(1, 2, 0, 3, 4)


def _split(tokens: Sequence[Tensor]) -> Sequence[Tensor]:
    """Queries, keys and values (B, M or N, h, d)."""
    return tokens[0].unbind(2) if len(tokens) == 1 else tokens


def _matrices(tokens: Sequence[Tensor], images: slice) -> list[Tensor]:
    """Of queries, keys and values, the matrices (rows, d) that `_Rows` speaks of."""
    d = tokens[0].shape[-1]
    if len(tokens) == 1:
        rows = tokens[0][images].view(-1, d)
        return [rows[i * tokens[0].shape[3] :] for i in range(3)]
    return [x[images].view(-1, d) for x in tokens]


class _Group(NamedTuple):
    """Some images, n = T1 * B * h."""

    images: slice
    rows: _Rows
    query: Tensor  # (T0, n, q, d), scaled
    keys: Tensor  # (2, n, R, s1 * d), keys and values
    extra: Tensor  # (2, B, h, E, d), keys and values


class _Step(NamedTuple):
    """A row of tiles, or some columns of it, n = columns * B * h."""

    row: int
    columns: slice
    n: slice
    seen: slice  # of R
    known: int  # where in `seen` what no earlier row has seen begins
    key: Tensor  # (n, E + s, d)
    value: Tensor
    bias: Tensor  # (columns, 1, h or 1, E + s, q)
    scores: tuple[Tensor, Tensor]  # (n, E + s, q) to work in


def _groups(tokens: Sequence[Tensor], axes: tuple[Axis, ...], tables: _Tables, scale: float) -> Iterator[_Group]:
    query, *rest = _split(tokens)
    (B, _, h, d), N = query.shape, len(tables.place)
    T1, R, s1 = tables.key.shape
    extra = rest[0].shape[1] - N
    size = max(1, CHUNK // (h * T1 * tables.mask[0, 0].numel()))
    for begin in range(0, B, size):
        images = slice(begin, min(begin + size, B))
        count = images.stop - begin
        rows = _rows(axes, extra, query.device, count, h, len(tokens) == 1)
        matrices = _matrices(tokens, images)
        keys = query.new_empty(2, T1 * count * h, R, s1 * d)
        for matrix, copies in zip(matrices[1:], keys):
            torch.index_select(matrix, 0, rows.key.view(-1), out=copies.view(-1, d))
        yield _Group(
            images,
            rows,
            F.embedding(rows.query, matrices[0]).flatten(1, 3).mul_(scale),
            keys,
            torch.stack([x[images, :extra] for x in rest]).transpose(2, 3),
        )


def _steps(group: _Group, tables: _Tables, bias: Tensor) -> Iterator[_Step]:
    _, B, h, E, d = group.extra.shape
    (_, T1, q), s = tables.query.shape, tables.mask.shape[2]
    columns = min(T1, max(1, CHUNK // (B * h * s * q)))
    room = group.query.new_empty(2, columns * B * h, s, q)
    joined = group.query.new_empty(2, columns * B * h, s, d) if E else None
    if joined is not None:
        joined.view(2, columns, B, h, s, d)[..., :E, :] = group.extra.unsqueeze(1)
    for first in range(0, T1, columns):
        last = min(first + columns, T1)
        n, count = slice(first * B * h, last * B * h), (last - first) * B * h
        known, mask_row = 0, -1
        for row, start in enumerate(tables.start):
            if mask_row != tables.mask_row[row]:
                mask_row = tables.mask_row[row]
                seen_bias = bias[mask_row].index_select(0, tables.mask_column[first:last]).unsqueeze(1)
            seen, known = slice(start, start + tables.row_keys), max(known, start)
            if joined is None:
                both = group.keys[:, n, seen].view(2, count, -1, d)
            else:
                both = joined[:, :count]
                both[:, :, E:].unflatten(2, (tables.row_keys, -1)).flatten(3).copy_(group.keys[:, n, seen])
            scores = room[0, :count], room[1, :count]
            yield _Step(row, slice(first, last), n, seen, known, both[0], both[1], seen_bias, scores)
            known = seen.stop


def _by_key(scores: Tensor, step: _Step, B: int) -> Tensor:
    """(n, E + s, q) -> (columns, B, h, E + s, q), as biases are laid out."""
    return scores.view(step.columns.stop - step.columns.start, B, -1, *scores.shape[1:])


def _write(target: Tensor, rows: Tensor, source: Tensor) -> None:
    """`target` (B, N, h, d) from those rows of `source` (..., d)."""
    matrix = source.view(-1, source.shape[-1])
    if target.is_contiguous():
        torch.index_select(matrix, 0, rows.view(-1), out=target.view(-1, target.shape[-1]))
    else:
        target.copy_(F.embedding(rows, matrix))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, *tokens: Tensor) -> Tensor:
        tokens = tuple(x.contiguous() for x in tokens)
        key = _split(tokens)[1]
        N = math.prod([axis.length for axis in axes])
        tables = _tables(axes, key.shape[1] - N, key.device)
        bias = _bias(tables, rpb, key.dtype)
        out = key.new_empty(len(key), N, *key.shape[2:])
        wide = torch.promote_types(key.dtype, torch.float32)
        sums = []
        for group in _groups(tokens, axes, tables, scale):
            tiled = torch.empty_like(group.query)
            sums.append(tiled.new_empty(*tiled.shape[:2], 1, tiled.shape[2], dtype=wide))
            for step in _steps(group, tables, bias):
                scores, result = step.scores[0], tiled[step.row, step.n]
                _by_key(scores, step, group.extra.shape[1]).copy_(step.bias)
                scores.baddbmm_(step.key, group.query[step.row, step.n].transpose(1, 2), alpha=LOG2_E)
                top = scores.amax(1, keepdim=True)
                total = scores.sub_(top).exp2_().sum(1, keepdim=True, dtype=wide)
                if scores.dtype == torch.float16:  # where a sum of values is too large for it, though their mean is not
                    torch.bmm(scores.div_(total).transpose(1, 2), step.value, out=result)
                else:
                    torch.bmm(scores.transpose(1, 2), step.value, out=result)
                    result.div_(total.transpose(1, 2))
                torch.add(top, total.log2_(), out=sums[-1][step.row, step.n])
            _write(out[group.images], group.rows.tile, tiled)
        ctx.save_for_backward(rpb, out, *tokens, *sums)
        ctx.axes, ctx.scale, ctx.count = axes, scale, len(tokens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # somebody may call backward inside autocast
            return _Attend._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rpb, out, *rest = ctx.saved_tensors
        tokens, sums = rest[: ctx.count], rest[ctx.count :]
        grad = grad.contiguous()
        # The mean of the scores' gradients under the probabilities, which the softmax takes off.
        mean = (grad * out).sum(-1).neg_()
        extra = _split(tokens)[1].shape[1] - out.shape[1]
        tables = _tables(ctx.axes, extra, out.device)
        bias = _bias(tables, rpb, out.dtype)
        d_bias = None
        if ctx.needs_input_grad[0]:
            d_bias = torch.zeros(bias.shape, dtype=rpb.dtype, device=rpb.device)
        grads = [torch.empty_like(x) for x in tokens]
        d_query, *d_keys = _split(grads)
        unused = d_query.shape[1] - out.shape[1]
        d_query[:, :unused] = 0
        for group, logsumexp in zip(_groups(tokens, ctx.axes, tables, ctx.scale), sums):
            images, rows = group.images, group.rows
            _, B, h, E, d = group.extra.shape
            T0, n, q, _ = group.query.shape
            d_out = F.embedding(rows.token, grad[images].view(-1, d)).view(T0, n, q, d)
            shift = mean[images].view(-1)[rows.token].view(T0, n, 1, q)
            if tables.fresh is not None:
                fresh = tables.fresh.view(T0, -1, 1, 1, q).expand(-1, -1, B, h, -1).reshape(T0, n, q)
                d_out, shift = d_out * fresh.unsqueeze(3), shift * fresh.unsqueeze(2)
            d_tiled = torch.empty_like(group.query)
            sent = torch.empty_like(group.keys)  # gradients of the copies of keys and values
            sent_extra = torch.zeros_like(group.extra)
            room = torch.empty(0)
            for step in _steps(group, tables, bias):
                here = step.row, step.n
                (p, ds), queries = step.scores, group.query[here]
                _by_key(p, step, B).copy_(step.bias)
                p.baddbmm_(step.key, queries.transpose(1, 2), alpha=LOG2_E).sub_(logsumexp[here]).exp2_()
                torch.baddbmm(shift[here], step.value, d_out[here].transpose(1, 2), out=ds).mul_(p)
                torch.bmm(ds.transpose(1, 2), step.key, out=d_tiled[here])
                if room.shape != step.key.shape:
                    room = torch.empty(step.key.shape, dtype=step.key.dtype, device=step.key.device)
                for i, (weights, vectors) in enumerate(((ds, queries), (p, d_out[here]))):
                    torch.bmm(weights, vectors, out=room)
                    part = room[:, E:].unflatten(1, (tables.row_keys, -1)).flatten(2)
                    old = step.known - step.seen.start
                    sent[i, step.n, step.seen.start : step.known] += part[:, :old]
                    sent[i, step.n, step.known : step.seen.stop] = part[:, old:]
                    if E:
                        sent_extra[i] += room[:, :E].view(-1, B, h, E, d).sum(0)
                if d_bias is not None:
                    by_key = _by_key(ds, step, B)
                    by_key = by_key[:, 0].to(rpb.dtype) if B == 1 else by_key.sum(1, dtype=rpb.dtype)
                    d_bias[tables.mask_row[step.row]].index_add_(0, tables.mask_column[step.columns], by_key)
            _write(d_query[images, unused:], rows.tile, d_tiled.mul_(ctx.scale))
            for target, copies, ours in zip(d_keys, sent, sent_extra):
                folded = F.embedding_bag(rows.bag, copies.view(-1, d), rows.bag_start, mode="sum")
                target[images, E:] = folded.view(B, -1, h, d)
                target[images, :E] = ours.transpose(1, 2)
        if d_bias is None:
            return None, None, None, *grads
        by_place = d_bias.permute(0, 1, 3, 4, 2).reshape(-1, len(rpb))
        d_rpb = F.embedding_bag(tables.entry_order, by_place, tables.entry_start, mode="sum")
        return d_rpb.t().reshape(rpb.shape), None, None, *grads


def attend_fused(rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, *tokens: Tensor) -> Tensor:
    """Neighborhood attention: qkv (B, E + N, 3, h, d), or queries (B, N, h, d), keys and values (B, E + N, h, d)
    -> (B, N, h, d)."""
    with torch.autocast(tokens[0].device.type, enabled=False):
        return _Attend.apply(rpb, axes, scale, *tokens)
