"""How neighborhood attention is computed: products of dense matrices, a row of tiles at a time, forward and backward.

All that a row of tiles needs is gathered from the tokens, worked on while it lies in the caches, and written. The
backward pass computes the scores again and needs only the sums of their exponentials; gradients of keys are carried
from a row to the next and written once no later row sees the key. So memory beyond the tokens' is that of one row.
Scores are kept by key, then query, as these products are faster.

Shapes: B batch, E extra tokens (prefix), N tokens of the grid, M = E + N, h heads, d channels a head; a grid has L rows
of X tokens, and T0 rows of T1 tiles; q = q0 q1 queries and s = s0 s1 keys of a tile; P rows and Q columns of distinct
masks. Tokens come as ``qkv`` (B, M, 3, h, d), or as queries (B, N, h, d), keys and values (B, M, h, d); extra ones
first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.neighborhood_tiles import Axis, Tiles, axis_tiles, product, tile_sizes

__all__ = ["attend_fused"]

#: Scores worked on at once: few enough to stay near a core, many enough to hide the cost of a call.
CHUNK = 1 << 18

#: Sums of exponentials between this and its inverse are as exact as those of scores less their maximum.
SMALL = 2.0**-40

#: Maps whose tables are kept: those of a large one are tens of megabytes.
KEPT = 32

#: Exponentials are of base 2: those of base e are many times slower where they underflow, as behind a mask.
LOG2_E = math.log2(math.e)

#: What one axis is multiplied by, to have a first one.
_NO_AXIS = Axis(1, 1, 1, 1, False, 0)


class _Tables(NamedTuple):
    rows: Tiles  # along the first axis: T0 of q0 queries and s0 keys
    columns: Tiles  # along the others: T1 of q1 and s1
    start: list[int]  # (T0,) first position of the keys of each row of tiles, by residue class
    mask_row: list[int]  # (T0,) which of the P
    mask_column: Tensor  # (T1,) which of the Q
    mask: Tensor  # (P, Q, E + s, q) zero where seen, minus infinity elsewhere
    entry: Tensor  # the same in the flattened table of biases, after whose end come zero and minus infinity
    entry_order: Tensor  # places in the flattened `entry`, sorted by entry of the table
    entry_start: Tensor  # (entries of the table,) where each begins in it
    fresh: list[Tensor] | None  # (T0,) of (T1, 1, 1, q, 1): whether the query is no repetition; None if none is
    queries: list[slice]  # (T0,) rows of the grid where the queries are that are no repetitions
    done: list[list[tuple[slice, slice]]]  # (T0,) keys that no later row sees: rows of the grid, and which of the s0


def _sorted(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What sorts `values`, and where each of 0 ... count - 1 begins among the sorted."""
    ends = torch.bincount(values, minlength=count).cumsum(0)
    return values.argsort(stable=True), F.pad(ends[:-1], (1, 0))


def _runs(rows: Sequence[int], step: int) -> list[tuple[slice, slice]]:
    """`rows` as slices with this step, and where each lies among them."""
    ends = [0, *[i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + step], len(rows)]
    return [(slice(rows[a], rows[b - 1] + 1, step), slice(a, b)) for a, b in pairwise(ends) if a < b]


@functools.lru_cache(maxsize=KEPT)
def _tables(axes: tuple[Axis, ...], extra: int, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        sizes = tile_sizes(axes)
        rows, columns = axis_tiles(axes[0], sizes[0], device), product(axes[1:], sizes[1:], device)
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

        fresh = rows.fresh[:, None, None, None, :, None] & columns.fresh[:, None, None, None, :]
        step, start, keys = axes[0].dilation, rows.start.tolist(), rows.key.shape[1]
        by_class = rows.order.tolist()
        after = [*start[1:], len(by_class)]
        return _Tables(
            rows,
            columns,
            start,
            mask_row.tolist(),
            mask_column,
            torch.zeros(entry.shape, device=device).masked_fill_(entry > end, -math.inf),
            entry,
            order[: int(first[end])],
            first[:end],
            None if bool(fresh.all()) else list(fresh.flatten(4).unsqueeze(5)),
            [slice(a, a + n * step, step) for a, n in zip(rows.query[:, 0].tolist(), rows.fresh.sum(1).tolist())],
            [_runs(by_class[a : min(b, a + keys)], step) for a, b in zip(start, after)],
        )


class _Index(NamedTuple):
    """Which rows of matrices (rows, d) are gathered, for some images and heads at a time: n = T1 * B * h."""

    query: list[Tensor]  # (T0,) of (n * q,): rows of queries
    key: list[Tensor]  # (T0,) of (n * (E + s),): rows of keys or values
    token: list[Tensor]  # (T0,) of (n * q,): rows of outputs (B, N, all heads)
    tile: Tensor  # (q0, B, X, h): queries of a row of tiles
    bag: Tensor  # keys of a row of tiles, sorted by row of the grid, image, token and head
    bag_start: Tensor  # (s0, B, X, h): where each begins in `bag`
    bag_end: list[int]  # (s0 + 1,): where each row of the grid begins


@functools.lru_cache(maxsize=KEPT)
def _index(
    axes: tuple[Axis, ...], extra: int, device: torch.device, B: int, h: int, all_heads: int, packed: bool
) -> _Index:
    with torch.inference_mode(False):
        rows, columns, *_ = _tables(axes, extra, device)
        X = math.prod([axis.length for axis in axes[1:]])
        N = axes[0].length * X
        image, head = torch.arange(B, device=device).view(-1, 1, 1), torch.arange(h, device=device).view(-1, 1)

        def gathered(tokens: Tensor, count: int, step: int) -> list[Tensor]:
            """(T0, T1, ...) of `count` tokens, each of `step` rows."""
            return list((image * (count * step) + tokens[:, :, None, None] * step + head).flatten(1).int())

        query = (rows.query[:, None, :, None] * X + columns.query[:, None, :]).flatten(2)
        key = (rows.key[:, None, :, None] * X + columns.key[:, None, :]).flatten(2) + extra
        key = torch.cat([torch.arange(extra, device=device).expand(*key.shape[:2], -1), key], dim=2)
        (_, q0), (T1, q1) = rows.query.shape, columns.query.shape
        s0, s1 = rows.key.shape[1], columns.key.shape[1]

        place = columns.query.where(columns.fresh, X).flatten().argsort()[:X].view(-1, 1)
        place = place // q1 * (B * h * q0 * q1) + place % q1 + head.view(-1) * (q0 * q1)
        tile = place + image * (h * q0 * q1) + torch.arange(q0, device=device).view(-1, 1, 1, 1) * q1

        at = torch.arange(T1 * B * h * s0 * s1, device=device).view(T1, B, h, s0, s1)
        to = torch.arange(s0, device=device).view(-1, 1) * B + image.unsqueeze(3)
        to = (to * X + columns.key.view(T1, 1, 1, 1, s1)) * h + head.unsqueeze(2)
        at = at + (at // (s0 * s1) + 1) * extra  # each tile begins with the extra tokens
        bag, bag_start = _sorted(to.flatten(), s0 * B * X * h)
        step = 3 * all_heads if packed else all_heads
        return _Index(
            gathered(query + extra, extra + N, step) if packed else gathered(query, N, step),
            gathered(key, extra + N, step),
            gathered(query, N, all_heads),
            tile.int(),
            at.flatten()[bag].int(),
            bag_start.int(),
            [*bag_start[:: B * X * h].tolist(), len(bag)],
        )


def _bias(tables: _Tables, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What scores in base 2 begin with: (P, Q, h or 1, E + s, q)."""
    if rpb is None:
        return tables.mask.to(dtype).unsqueeze(2)
    table = F.pad(F.pad(rpb.flatten(1).to(dtype) * LOG2_E, (0, 1)), (0, 1), value=-math.inf)
    return table.index_select(1, tables.entry.flatten()).view(-1, *tables.entry.shape).permute(1, 2, 0, 3, 4)


def _biases(tables: _Tables, bias: Tensor, heads: slice) -> Iterator[Tensor]:
    """Of each row of tiles: (T1, 1, h or 1, E + s, q)."""
    known = -1
    for row in tables.mask_row:
        if row != known:
            ours = bias[row] if bias.shape[2] == 1 else bias[row, :, heads]
            known, found = row, ours.index_select(0, tables.mask_column).unsqueeze(1)
        yield found


def _split(tokens: Sequence[Tensor]) -> Sequence[Tensor]:
    """Queries, keys and values (B, M or N, h, d)."""
    return tokens[0].unbind(2) if len(tokens) == 1 else tokens


def _matrix(tokens: Tensor, images: slice, row: int) -> Tensor:
    """What `_Index` speaks of: (rows, d) from this row on."""
    return tokens[images].view(-1, tokens.shape[-1])[row:]


class _Group(NamedTuple):
    """Some images and heads."""

    images: slice
    heads: slice
    shape: tuple[int, int, int]  # T1, B, h
    places: _Index
    tokens: list[Tensor]  # queries, keys, values: (rows, d)


def _groups(tokens: Sequence[Tensor], axes: tuple[Axis, ...], tables: _Tables) -> Iterator[_Group]:
    (B, M, h, _), device = _split(tokens)[1].shape, tokens[0].device
    extra = M - math.prod([axis.length for axis in axes])
    T1, packed = len(tables.mask_column), len(tokens) == 1
    at_once = max(1, CHUNK // (T1 * tables.mask[0, 0].numel()))
    count, heads_at_once = max(1, at_once // h), min(h, at_once)
    for first in range(0, B, count):
        images = slice(first, min(first + count, B))
        for head in range(0, h, heads_at_once):
            heads = slice(head, min(head + heads_at_once, h))
            shape = T1, images.stop - first, heads.stop - head
            matrices = [_matrix(tokens[0 if packed else i], images, head + (i * h if packed else 0)) for i in range(3)]
            yield _Group(images, heads, shape, _index(axes, extra, device, *shape[1:], h, packed), matrices)


def _gather(group: _Group, row: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Those of a row of tiles: (n, q, d), (n, E + s, d) and the same."""
    places = group.places.query[row], group.places.key[row], group.places.key[row]
    for tokens, place, out in zip(group.tokens, places, (query, key, value)):
        torch.index_select(tokens, 0, place, out=out.view(-1, out.shape[-1]))


def _exponentials(
    scores: Tensor,
    by_key: Tensor,
    bias: Tensor,
    keys: Tensor,
    queries: Tensor,
    factor: float,
    dtype: torch.dtype,
    shift: bool,
) -> tuple[Tensor | None, Tensor]:
    """Written to `scores` (n, E + s, q), of which `by_key` is a view; gives the maximum taken off, if any, and sums."""
    by_key.copy_(bias)
    scores.baddbmm_(keys, queries, alpha=factor)
    top = scores.amax(1, keepdim=True) if shift else None
    if top is not None:
        scores.sub_(top)
    return top, scores.exp2_().sum(1, keepdim=True, dtype=dtype)


def _harmless(total: Tensor) -> bool:
    """Whether sums of exponentials are of a size that loses nothing, though nothing was taken off the scores."""
    return float(total.min()) > SMALL and float(total.max()) < 1 / SMALL


def _grid(tokens: Tensor, group: _Group, rows: int) -> Tensor:
    """(all B, N, all h, d) -> (L, B, X, h, d), what a group writes of it."""
    return tokens[group.images, :, group.heads].unflatten(1, (rows, -1)).transpose(0, 1)


def _write_queries(grid: Tensor, group: _Group, rows: slice, tiled: Tensor, factor: float = 1.0) -> None:
    """These rows of `grid` (L, B, X, h, d) from a row of tiles (n, q, d)."""
    target = grid[rows]
    torch.mul(F.embedding(group.places.tile[: len(target)], tiled.view(-1, tiled.shape[-1])), factor, out=target)


def _write_keys(grid: Tensor, group: _Group, done: list[tuple[slice, slice]], sent: Tensor, factor: float) -> None:
    """The rows of `grid` (L, B, X, h, d) that are done, from what a row of tiles sends to its keys (n, E + s, d)."""
    count, (bag, start, end) = done[-1][1].stop, group.places[-3:]
    start = start.narrow(0, 0, count * math.prod(grid.shape[1:4]))
    folded = F.embedding_bag(bag[: end[count]], sent.view(-1, sent.shape[-1]), start, mode="sum")
    folded = folded.view(count, *grid.shape[1:])
    for of_grid, of_row in done:
        torch.mul(folded[of_row], factor, out=grid[of_grid])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, *tokens: Tensor) -> Tensor:
        tokens = tuple(x.contiguous() for x in tokens)
        key = _split(tokens)[1]
        B, N, h, d = len(key), math.prod([axis.length for axis in axes]), *key.shape[2:]
        tables = _tables(axes, key.shape[1] - N, key.device)
        bias = _bias(tables, rpb, key.dtype)
        (s, q), dtype = tables.mask.shape[2:], key.dtype
        out = key.new_empty(B, N, h, d)
        wide = torch.promote_types(dtype, torch.float32)
        sums, plains = [], []
        for group in _groups(tokens, axes, tables):
            n = math.prod(group.shape)
            scores, query, result = key.new_empty(n, s, q), key.new_empty(n, q, d), key.new_empty(n, q, d)
            keys, values = key.new_empty(2, n, s, d)
            by_key = scores.view(*group.shape, s, q)
            target = _grid(out, group, axes[0].length)
            sums.append(key.new_empty(len(tables.start), n, 1, q, dtype=wide))
            # From this row on the maximum is taken off; of such, `sums` holds logarithms, of earlier rows inverses.
            plain = len(tables.start) if dtype != torch.float16 and key.device.type == "cpu" else 0
            for row, (row_bias, rows) in enumerate(zip(_biases(tables, bias, group.heads), tables.queries)):
                _gather(group, row, query, keys, values)
                exponentials = functools.partial(
                    _exponentials, scores, by_key, row_bias, keys, query.transpose(1, 2), scale * LOG2_E, wide
                )
                top, total = exponentials(row >= plain)
                if row < plain and not _harmless(total):
                    plain = row
                    top, total = exponentials(True)
                if dtype == torch.float16:  # where a sum of values is too large for it, though their mean is not
                    torch.bmm(scores.div_(total).transpose(1, 2), values, out=result)
                else:
                    torch.bmm(scores.transpose(1, 2), values, out=result)
                    result.div_(total.transpose(1, 2))
                if top is None:
                    torch.reciprocal(total, out=sums[-1][row])
                else:
                    torch.add(top, total.log2_(), out=sums[-1][row])
                _write_queries(target, group, rows, result)
            plains.append(plain)
        ctx.save_for_backward(rpb, out, *tokens, *sums)
        ctx.axes, ctx.scale, ctx.count, ctx.plains = axes, scale, len(tokens), plains
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # somebody may call backward inside autocast
            return _Attend._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rpb, out, *rest = ctx.saved_tensors
        tokens, sums = rest[: ctx.count], rest[ctx.count :]
        axes, scale, d, dtype = ctx.axes, ctx.scale, out.shape[-1], out.dtype
        grad = grad.contiguous()
        E = _split(tokens)[1].shape[1] - out.shape[1]
        tables = _tables(axes, E, out.device)
        bias = _bias(tables, rpb, dtype)
        (s, q), s0 = tables.mask.shape[2:], tables.rows.key.shape[1]
        d_bias = None
        if ctx.needs_input_grad[0]:
            d_bias = torch.zeros(bias.shape, dtype=rpb.dtype, device=rpb.device)
        grads = [torch.empty_like(x) for x in tokens]  # every key is seen by its own query at least
        d_query, d_key, d_value = _split(grads)
        unused = d_query.shape[1] - out.shape[1]
        d_query[:, :unused] = 0
        for group, group_sums, plain in zip(_groups(tokens, axes, tables), sums, ctx.plains):
            n = math.prod(group.shape)
            p, ds = out.new_empty(2, n, s, q)
            query, row_out, row_grad, result = out.new_empty(4, n, q, d)
            keys, values = out.new_empty(2, n, s, d)
            rooms = out.new_empty(2, 2, n, s, d)
            targets = [_grid(x, group, axes[0].length) for x in (d_query[:, unused:], d_key[:, E:], d_value[:, E:])]
            sent_extra = out.new_zeros(2, *group.shape[1:], E, d)
            grad_rows, out_rows = (_matrix(x, group.images, group.heads.start) for x in (grad, out))
            for row, (row_bias, rows) in enumerate(zip(_biases(tables, bias, group.heads), tables.queries)):
                _gather(group, row, query, keys, values)
                torch.index_select(grad_rows, 0, group.places.token[row], out=row_grad.view(-1, d))
                torch.index_select(out_rows, 0, group.places.token[row], out=row_out.view(-1, d))
                if tables.fresh is not None:
                    row_grad.view(*group.shape, q, d).mul_(tables.fresh[row])
                if row < plain:
                    row_grad.mul_(group_sums[row].transpose(1, 2))
                # The mean of the scores' gradients under the probabilities, which the softmax takes off.
                mean = row_out.mul_(row_grad).sum(-1).neg_().unsqueeze(1)
                p.view(*group.shape, s, q).copy_(row_bias)
                p.baddbmm_(keys, query.transpose(1, 2), alpha=scale * LOG2_E)
                if row >= plain:
                    p.sub_(group_sums[row])
                p.exp2_()
                ds.copy_(mean).baddbmm_(values, row_grad.transpose(1, 2)).mul_(p)

                torch.bmm(ds.transpose(1, 2), keys, out=result)
                _write_queries(targets[0], group, rows, result, scale)

                room, before = rooms[row % 2], rooms[1 - row % 2]
                torch.bmm(ds, query, out=room[0])
                torch.bmm(p, row_grad, out=room[1])
                if E:
                    sent_extra += room[:, :, :E].view(2, *group.shape, E, d).sum(1)
                moved = tables.start[row] - tables.start[row - 1] if row else s0
                if moved < s0:
                    carried = (s0 - moved) * (s - E) // s0
                    room.narrow(2, E, carried).add_(before.narrow(2, s - carried, carried))
                if tables.done[row]:
                    _write_keys(targets[1], group, tables.done[row], room[0], scale)
                    _write_keys(targets[2], group, tables.done[row], room[1], 1.0)

                if d_bias is not None:
                    by_key = ds.view(*group.shape, s, q)
                    by_key = by_key[:, 0].to(rpb.dtype) if group.shape[1] == 1 else by_key.sum(1, dtype=rpb.dtype)
                    ours = d_bias[tables.mask_row[row], :, group.heads]
                    ours.index_add_(0, tables.mask_column, by_key)
            for target, sent, factor in zip((d_key, d_value), sent_extra, (scale, 1.0)):
                torch.mul(sent.transpose(1, 2), factor, out=target[group.images, :E, group.heads])
        if d_bias is None:
            return None, None, None, *grads
        by_place = d_bias.permute(0, 1, 3, 4, 2).reshape(-1, len(rpb))
        d_rpb = F.embedding_bag(tables.entry_order, by_place, tables.entry_start, mode="sum")
        return d_rpb.t().reshape(rpb.shape), None, None, *grads


def attend_fused(rpb: Tensor | None, axes: tuple[Axis, ...], scale: float, *tokens: Tensor) -> Tensor:
    """Neighborhood attention: qkv (B, E + N, 3, h, d), or queries (B, N, h, d), keys and values (B, E + N, h, d)
    -> (B, N, h, d)."""
    axes = axes if len(axes) > 1 else (_NO_AXIS, *axes)
    with torch.autocast(tokens[0].device.type, enabled=False):
        return _Attend.apply(rpb, axes, scale, *tokens)
