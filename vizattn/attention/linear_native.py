"""ReLU linear attention by the compiled library.

Shapes: B images, N queries, M keys, h heads, d channels of queries and keys a head, e of values.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vizattn.attention import native
from vizattn.layers.eager import derived_again, gradients_of

__all__ = ["attend_linear"]

#: LinearTask in linear.cpp: 13 tensors, steps of the 8 that have tokens, and 6 sizes.
_TASK = native.layout(13, 8 * 3 + 6)
_TENSORS, _NUMBERS = native.layout(13, 0), struct.Struct("@30q")


@functools.lru_cache(maxsize=256)
def _numbers(query: tuple[int, ...], value: tuple[int, ...], *steps: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
    """Steps and sizes of a forward pass, by the shapes of queries and values and by all strides; the outputs' shape.

    Kept, as over few tokens it is felt to put them together.
    """
    (B, h, N, d), (M, e) = query, value[2:]
    out = N * h * e, e, h * e, 1
    return _NUMBERS.pack(*[s for x in (*steps, out) for s in x[:3]], *[0] * 12, B, h, N, M, d, e), out


def _forward(
    min_sum: float, temperature: Tensor | None, query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, ...]
) -> Tensor:
    """(B, h, N, e), one token after another in memory."""
    numbers, strides = _numbers(query.shape, value.shape, query.stride(), key.stride(), value.stride())
    out = value.new_empty_strided((*query.shape[:3], value.shape[3]), strides)
    factors = 0 if temperature is None else temperature.data_ptr()
    tensors = query.data_ptr(), key.data_ptr(), value.data_ptr(), factors, 0, out.data_ptr()
    context, sums, totals = native.addresses(*kept) if kept else (0, 0, 0)
    native.call("linear_forward", _TENSORS, min_sum, *tensors, context, sums, totals, 0, 0, 0, 0, numbers=numbers)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plain: Callable[..., Tensor],
        min_sum: float,
        temperature: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        (B, h, N, d), e = query.shape, value.shape[-1]
        kept = value.new_empty(B, h, d, e), value.new_empty(B, h, d), value.new_empty(B, h, N)
        out = _forward(min_sum, temperature, query, key, value, kept)
        ctx.save_for_backward(temperature, query, key, value, out, *kept)
        ctx.plain, ctx.min_sum = plain, min_sum
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        temperature, *saved = ctx.saved_tensors
        if derived_again(grad):

            def plain(*inputs: Tensor) -> Tensor:
                return ctx.plain(*inputs, min_sum=ctx.min_sum)

            with torch.autocast("cpu", enabled=False):
                *d_tokens, d_temperature = gradients_of(plain, (*saved[:3], temperature), grad)
            return None, None, d_temperature, *d_tokens
        tokens = [*(native.side_by_side(x) for x in saved[:4]), native.readable(grad)]
        kept = [x.contiguous() for x in saved[4:]]
        grads = [native.like(x) for x in tokens[:3]]
        query, key, value, out, grad = tokens
        d_temperature = None
        if temperature is not None:
            temperature = temperature.contiguous()
            d_temperature = temperature.new_empty(*query.shape[:2], 1, 1)
        native.call(
            "linear_backward",
            _TASK,
            ctx.min_sum,
            *native.addresses(query, key, value, temperature, grad, out, *kept, *grads, d_temperature),
            *native.steps(query, key, value, out, *grads, grad),
            *(*query.shape[:3], key.shape[2], query.shape[3], value.shape[3]),
        )
        return None, None, None if d_temperature is None else d_temperature.sum(0), *grads


def attend_linear(
    query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None, min_sum: float, plain: Callable[..., Tensor]
) -> Tensor:
    """What `plain` computes of the same: (B, h, N, d), (B, h, M, d), (B, h, M, e), (h, 1, 1) -> (B, h, N, e).

    It computes derivatives of derivatives, too.
    """
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = native.side_by_side(query), native.side_by_side(key), native.side_by_side(value)
    if temperature is not None:
        temperature = temperature.contiguous()
    if torch.is_grad_enabled():
        return _Attend.apply(plain, min_sum, temperature, query, key, value)
    return _forward(min_sum, temperature, query, key, value, ())
