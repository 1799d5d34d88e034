"""ReLU linear attention by the compiled library.

Shapes: B images, N queries, M keys, h heads, d channels of queries and keys a head, e of values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vizattn.attention import native
from vizattn.attention.eager import derived_again, gradients_of

__all__ = ["attend_linear"]


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "temperature", "grad")),
        *((name, ctypes.c_void_p) for name in ("out", "context", "sums", "totals")),
        *((name, ctypes.c_void_p) for name in ("d_query", "d_key", "d_value", "d_temperature")),
        *((name, ctypes.c_int64 * 3) for name in (*native.STEPS, "grad_step")),
        *((name, ctypes.c_int64) for name in ("images", "heads", "queries", "keys", "channels", "value_channels")),
        *((name, ctypes.c_int64) for name in ("lanes", "threads")),
        ("min_sum", ctypes.c_float),
    )


def _task(min_sum: float, temperature: Tensor | None, *tensors: Tensor) -> _Task:
    """Of queries (B, h, N, d), keys, values, outputs (B, N, h, e), and what a head keeps of its tokens."""
    query, key, value, out, *_ = tensors
    task = _Task(min_sum=min_sum)
    task.images, task.heads, task.queries, task.channels = query.shape
    task.keys, task.value_channels = value.shape[2:]
    native.set_steps(task, native.STEPS, [*(x.transpose(1, 2) for x in (query, key, value)), out])
    for name, x in zip(("query", "key", "value", "out", "context", "sums", "totals"), tensors):
        setattr(task, name, x.data_ptr())
    if temperature is not None:
        task.temperature = temperature.data_ptr()
    return task


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
        out = value.new_empty(B, N, h, e)
        kept = value.new_empty(B, h, d, e), value.new_empty(B, h, d), value.new_empty(B, h, N)
        native.call("linear_forward", _task(min_sum, temperature, query, key, value, out, *kept))
        ctx.save_for_backward(temperature, query, key, value, out, *kept)
        ctx.plain, ctx.min_sum = plain, min_sum
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        temperature, *saved = ctx.saved_tensors
        if derived_again(grad):

            def plain(*inputs: Tensor) -> Tensor:
                return ctx.plain(*inputs, min_sum=ctx.min_sum).transpose(1, 2)

            with torch.autocast("cpu", enabled=False):
                *d_tokens, d_temperature = gradients_of(plain, (*saved[:3], temperature), grad)
            return None, None, d_temperature, *d_tokens
        query, key, value, *kept = saved
        tokens, kept = [native.side_by_side(x) for x in (query, key, value)], [x.contiguous() for x in kept]
        temperature = None if temperature is None else temperature.contiguous()
        grad = native.side_by_side(grad)
        grads = [x.new_empty(x.transpose(1, 2).shape) for x in tokens]
        task = _task(ctx.min_sum, temperature, *tokens, *kept)
        task.grad = grad.data_ptr()
        task.d_query, task.d_key, task.d_value = (x.data_ptr() for x in grads)
        native.set_steps(task, (*native.STEPS[4:], "grad_step"), (*grads, grad))
        d_temperature = None
        if temperature is not None:
            d_temperature = temperature.new_empty(*query.shape[:2], 1, 1)
            task.d_temperature = d_temperature.data_ptr()
        native.call("linear_backward", task)
        d_temperature = None if d_temperature is None else d_temperature.sum(0)
        return None, None, d_temperature, *(x.transpose(1, 2) for x in grads)


def attend_linear(
    query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None, min_sum: float, plain: Callable[..., Tensor]
) -> Tensor:
    """What `plain` computes of the same: (B, h, N, d), (B, h, M, d), (B, h, M, e), (h, 1, 1) -> (B, h, N, e).

    It computes derivatives of derivatives, too.
    """
    tokens = [native.side_by_side(x) for x in (query, key, value)]
    return _Attend.apply(plain, min_sum, None if temperature is None else temperature.contiguous(), *tokens).transpose(
        1, 2
    )
