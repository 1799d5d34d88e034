"""How halo attention is computed on a CPU: a row of blocks at a time, forward and backward.

What a row of blocks needs is gathered from the map, worked on while it lies in the caches, and written; the backward
pass computes the logits again. Gradients of keys are carried from row to row, and written once no later row sees the
key. Logits are kept by key, then query, as these products are faster.

Shapes: g samples times heads, n x m blocks of Q queries, w x w keys of a block, E extra keys, d channels of a head, e
of its values. The map is filled up to n blocks of b rows and a halo on either side, w = b + 2 * halo: (n - 1) * b + w
rows, and likewise columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention.halo_plain import attend_plain
from vizattn.layers.eager import derived_again, gradients_of

__all__ = ["attend_blocks"]

#: Logits worked on at once: few enough to stay near a core.
CHUNK = 1 << 18

#: Exponentials are of base 2: those of base e are many times slower where they underflow, as behind a mask.
LOG2_E = math.log2(math.e)


class _Index(NamedTuple):
    """Of a row of blocks, for some samples and heads."""

    key: Tensor  # (g * m * w * w,) rows of keys, of a matrix that begins with the first key of the blocks
    bag: Tensor  # keys of the blocks, sorted by row of the map, sample and head, and column
    bag_start: Tensor  # (w * g * width,) where each begins in `bag`
    bag_end: list[int]  # (w + 1,) where each row of the map begins


@functools.lru_cache(maxsize=32)
def _index(g: int, m: int, w: int, block: int, height: int, extra: int, device: torch.device) -> _Index:
    with torch.inference_mode(False):
        width = (m - 1) * block + w
        sample = torch.arange(g, device=device).view(-1, 1, 1, 1)
        column = (torch.arange(m, device=device) * block).view(-1, 1, 1) + torch.arange(w, device=device)
        row = torch.arange(w, device=device).view(-1, 1)
        key = (sample * height + row) * width + column
        to = ((row * g + sample) * width + column).flatten()
        order, end = to.argsort(stable=True), torch.bincount(to, minlength=w * g * width).cumsum(0)
        start = F.pad(end[:-1], (1, 0))
        bag = order + (order // (w * w) + 1) * extra  # each block begins with the extra keys
        return _Index(key.flatten().int(), bag.int(), start.int(), [*start[:: g * width].tolist(), len(bag)])


@functools.lru_cache(maxsize=32)
def _places(w: int, extra: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(E + w * w, 2 * w): row and column of each key, one-hot."""
    with torch.inference_mode(False):
        one = torch.eye(w, dtype=dtype, device=device)
        places = torch.cat([one.repeat_interleave(w, dim=0), one.repeat(w, 1)], dim=1)
        return F.pad(places, (0, 0, extra, 0))


class _Part(NamedTuple):
    """Some samples and heads."""

    g: slice
    rows: _Index
    places: Tensor  # (g * m, E + w * w, 2 * w)
    keys: Tensor  # (g * m, E + w * w, d) to gather into
    values: Tensor  # (g * m, E + w * w, e)


def _parts(
    query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor, w: int, block: int
) -> Iterator[_Part]:
    (_, g, m, Q, d), (E, e) = query.shape, extra_value.shape[1:]
    step = max(1, CHUNK // (m * Q * (E + w * w)))
    places = _places(w, E, key.dtype, key.device)
    for first in range(0, g, step):
        part = slice(first, min(first + step, g))
        count = (part.stop - first) * m
        keys, values = key.new_empty(count, E + w * w, d), value.new_empty(count, E + w * w, e)
        keys.view(-1, m, *keys.shape[1:])[:, :, :E] = extra_key[part].unsqueeze(1)
        values.view(-1, m, *values.shape[1:])[:, :, :E] = extra_value[part].unsqueeze(1)
        index = _index(part.stop - first, m, w, block, key.shape[1], E, key.device)
        yield _Part(part, index, places.expand(count, -1, -1), keys, values)


def _gather(part: _Part, row: int, block: int, key: Tensor, value: Tensor, E: int) -> None:
    """Keys and values of a row of blocks."""
    for tokens, out in ((key, part.keys), (value, part.values)):
        found = tokens[part.g].view(-1, tokens.shape[-1])[row * block * tokens.shape[2] :]
        if E:
            out[:, E:] = F.embedding(part.rows.key, found).view(len(out), -1, out.shape[2])
        else:
            torch.index_select(found, 0, part.rows.key, out=out.view(-1, out.shape[2]))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: int, w: int, scale: float, *tensors: Tensor) -> Tensor:
        query, by_axis, key, value, extra_key, extra_value = tensors
        (n, g, m, Q, _), (E, e) = query.shape, extra_value.shape[1:]
        out = value.new_empty(n, g, m, Q, e)
        wide = torch.promote_types(key.dtype, torch.float32)
        sums = query.new_empty(n, g, m, 1, Q, dtype=wide)
        for part in _parts(query, key, value, extra_key, extra_value, w, block):
            logits = key.new_empty(len(part.keys), E + w * w, Q)
            for row in range(n):
                _gather(part, row, block, key, value, E)
                queries, positions = query[row, part.g].flatten(0, 1), by_axis[row, part.g].flatten(0, 1)
                torch.bmm(part.places, positions.transpose(1, 2), out=logits)
                logits.baddbmm_(part.keys, queries.transpose(1, 2), beta=LOG2_E, alpha=scale * LOG2_E)
                top = logits.amax(1, keepdim=True)
                total = logits.sub_(top).exp2_().sum(1, keepdim=True, dtype=wide)
                result = out[row, part.g].flatten(0, 1)
                torch.bmm(logits.transpose(1, 2), part.values, out=result).div_(total.transpose(1, 2))
                sums[row, part.g] = (top + total.log2_()).view(-1, m, 1, Q)
        ctx.save_for_backward(*tensors, out, sums)
        ctx.block, ctx.w, ctx.scale = block, w, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # somebody may call backward inside autocast
            if derived_again(grad):
                plain = functools.partial(attend_plain, block=ctx.block)
                return None, None, None, *gradients_of(plain, ctx.saved_tensors[:6], grad)
            return None, None, None, *_Attend._backward(ctx, grad.contiguous())

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> list[Tensor]:
        *tensors, out, sums = ctx.saved_tensors
        query, by_axis, key, value, extra_key, extra_value = tensors
        block, w, scale = ctx.block, ctx.w, ctx.scale
        (n, _, m, Q, _), E = query.shape, extra_value.shape[1]
        grads = [torch.empty_like(x) for x in tensors]
        d_query, d_by_axis, d_key, d_value, d_extra_key, d_extra_value = grads
        for part in _parts(query, key, value, extra_key, extra_value, w, block):
            count, s = part.keys.shape[:2]
            p, ds = key.new_empty(2, count, s, Q)
            sent = [[x.new_empty(count, s, x.shape[-1]) for _ in range(2)] for x in (key, value)]
            sent_extra = [torch.zeros_like(x[part.g]) for x in (extra_key, extra_value)]
            for row in range(n):
                _gather(part, row, block, key, value, E)
                queries, positions = query[row, part.g].flatten(0, 1), by_axis[row, part.g].flatten(0, 1)
                d_out = grad[row, part.g].flatten(0, 1)
                torch.bmm(part.places, positions.transpose(1, 2), out=p)
                p.baddbmm_(part.keys, queries.transpose(1, 2), beta=LOG2_E, alpha=scale * LOG2_E)
                p.sub_(sums[row, part.g].flatten(0, 1)).exp2_()
                # The mean of the logits' gradients under the weights, which the softmax takes off.
                mean = (d_out * out[row, part.g].flatten(0, 1)).sum(-1).neg_().unsqueeze(1)
                ds.copy_(mean).baddbmm_(part.values, d_out.transpose(1, 2)).mul_(p)
                by_query = ds.transpose(1, 2)
                torch.bmm(by_query, part.places, out=d_by_axis[row, part.g].flatten(0, 1))
                torch.bmm(by_query, part.keys, out=d_query[row, part.g].flatten(0, 1)).mul_(scale)
                ds.mul_(scale)
                done = block if row < n - 1 else w
                for target, rooms, extra, weights, vectors in (
                    (d_key, sent[0], sent_extra[0], ds, queries),
                    (d_value, sent[1], sent_extra[1], p, d_out),
                ):
                    room, before = rooms[row % 2], rooms[1 - row % 2]
                    torch.bmm(weights, vectors, out=room)
                    if row and w > block:
                        carried = (w - block) * w
                        room.narrow(1, E, carried).add_(before.narrow(1, s - carried, carried))
                    if E:
                        extra += room[:, :E].view(-1, m, *extra.shape[1:]).sum(1)
                    written = target[part.g, row * block : row * block + done].transpose(0, 1)
                    starts = part.rows.bag_start.narrow(0, 0, math.prod(written.shape[:3]))
                    bag = part.rows.bag[: part.rows.bag_end[done]]
                    folded = F.embedding_bag(bag, room.view(-1, room.shape[-1]), starts, mode="sum")
                    written.copy_(folded.view(written.shape))
            d_extra_key[part.g], d_extra_value[part.g] = sent_extra
        return grads


def attend_blocks(
    query: Tensor,
    by_axis: Tensor,
    key: Tensor,
    value: Tensor,
    extra_key: Tensor,
    extra_value: Tensor,
    block: int,
) -> Tensor:
    """`attend_plain` without dropout, and by rows of blocks."""
    with torch.autocast(key.device.type, enabled=False):
        by_axis = by_axis.clamp(min=torch.finfo(by_axis.dtype).min / 4)  # finite, for it is multiplied by zeros
        tensors = [x.to(key.dtype).contiguous() for x in (query, by_axis, key, value, extra_key, extra_value)]
        return _Attend.apply(block, by_axis.shape[-1] // 2, query.shape[-1] ** -0.5, *tensors)
