"""Softmax attention of tiles of queries to gathered keys, by the compiled library.

Shapes: B images, T tiles of q queries and s keys, N queries, M keys, h heads, d channels a head, P masks.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vizattn.attention import native
from vizattn.attention.eager import derived_again, gradients_of

__all__ = ["Tiling", "attend_tiles"]


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "bias", "grad")),
        *((name, ctypes.c_void_p) for name in ("out", "d_query", "d_key", "d_value", "d_bias")),
        *((name, ctypes.c_void_p) for name in ("query_at", "key_at", "mask_at")),
        *((name, ctypes.c_int64 * 3) for name in native.STEPS),
        *((name, ctypes.c_int64) for name in ("images", "heads", "channels", "tiles", "queries", "keys")),
        *((name, ctypes.c_int64) for name in ("bias_heads", "key_at_step", "lanes", "threads")),
        ("scale", ctypes.c_float),
    )


class Tiling(NamedTuple):
    """Which queries attend to which keys."""

    query_at: Tensor  # (T, q) int32: queries, -1 for none
    key_at: Tensor  # (T, s) int32: keys, each once in a tile; or (B, T, s); where there is no bias, -1 for none
    mask_at: Tensor | None  # (T,) int32: which of the P masks; None: the only one


def _task(tiling: Tiling, bias: Tensor | None, scale: float, out: Tensor, *tokens: Tensor) -> _Task:
    """`out` (B, N, h, d) and queries, keys and values, likewise, whose numbers are given only to be read."""
    task = _Task(scale=scale)
    native.set_steps(task, native.STEPS, (*tokens, out))
    task.query, task.key, task.value = (x.data_ptr() for x in tokens)
    task.images, _, task.heads, task.channels = out.shape
    (task.tiles, task.queries), task.keys = tiling.query_at.shape, tiling.key_at.shape[-1]
    task.query_at, task.key_at = tiling.query_at.data_ptr(), tiling.key_at.data_ptr()
    task.key_at_step = tiling.key_at.stride(0) if tiling.key_at.dim() == 3 else 0
    if tiling.mask_at is not None:
        task.mask_at = tiling.mask_at.data_ptr()
    if bias is not None:
        task.bias, task.bias_heads = bias.data_ptr(), bias.shape[1]
    return task


def _split(tokens: Sequence[Tensor], N: int) -> tuple[Tensor, ...]:
    """Queries (B, N, h, d), keys and values (B, M, h, d)."""
    query, key, value = tokens[0].unbind(2) if len(tokens) == 1 else tokens
    return query[:, query.shape[1] - N :], key, value


def _plain(bias: Tensor | None, *tokens: Tensor, tiling: Tiling, scale: float, N: int) -> Tensor:
    """The same in plain operations, for derivatives of derivatives."""
    B, image = len(tokens[0]), torch.arange(len(tokens[0]), device="cpu").view(-1, 1, 1)
    query, key, value = _split(tokens, N)
    query = query[:, tiling.query_at.clamp(min=0)].transpose(2, 3)
    key, value = (x[image, tiling.key_at.expand(B, -1, -1)].transpose(2, 3) for x in (key, value))
    scores = (query * scale @ key.transpose(-2, -1)).masked_fill((tiling.key_at < 0)[..., None, None, :], -torch.inf)
    if bias is not None:
        scores = scores + (bias if tiling.mask_at is None else bias[tiling.mask_at]).transpose(-2, -1)
    out = (scores.softmax(dim=-1) @ value).transpose(2, 3).flatten(1, 2)
    return out[:, torch.where(tiling.query_at < 0, N, tiling.query_at).flatten().argsort()[:N]]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, tiling: Tiling, scale: float, N: int, *tokens: Tensor) -> Tensor:
        parts = _split(tokens, N)
        B, _, h, d = parts[1].shape
        out = tokens[0].new_empty(B, N, h, d)
        task = _task(tiling, bias, scale, out, *parts)
        task.out = out.data_ptr()
        native.call("tiles_forward", task)
        ctx.save_for_backward(bias, *tokens)
        ctx.tiling, ctx.scale, ctx.N = tiling, scale, N
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        bias, *tokens = ctx.saved_tensors
        if derived_again(grad):
            plain = functools.partial(_plain, tiling=ctx.tiling, scale=ctx.scale, N=ctx.N)
            with torch.autocast("cpu", enabled=False):
                d_bias, *d_tokens = gradients_of(plain, (bias, *tokens), grad)
            return d_bias, None, None, None, *d_tokens
        bias, grad = None if bias is None else bias.contiguous(), native.side_by_side(grad)
        tokens = [native.side_by_side(x) for x in tokens]
        grads = [grad.new_zeros(x.shape) for x in tokens]
        task = _task(ctx.tiling, bias, ctx.scale, grad, *_split(tokens, ctx.N))
        task.grad = grad.data_ptr()
        parts = _split(grads, ctx.N)
        task.d_query, task.d_key, task.d_value = (x.data_ptr() for x in parts)
        native.set_steps(task, native.STEPS[4:], parts)
        d_bias = None
        if bias is not None and ctx.needs_input_grad[0]:
            d_bias = torch.zeros_like(bias)
            task.d_bias = d_bias.data_ptr()
        native.call("tiles_backward", task)
        return d_bias, None, None, None, *grads


def attend_tiles(bias: Tensor | None, tiling: Tiling, scale: float, N: int, *tokens: Tensor) -> Tensor:
    """softmax(scale * query key^T + bias) value: of each query over the keys of its tile, some of which a bias masks.

    Time is O(T q s h d); memory beyond the results' is that of one tile.

    Args:
        bias: (P, h or 1, s, q), what scores begin with, minus infinity where a key is not seen; every query must see
            one. None for no bias.
        tiling: Which query and key is where; every query is in one tile.
        scale: Factor of the products.
        N: How many queries.
        tokens: For which `native.usable` holds: qkv (B, M, 3, h, d), of which the last N are queries, or queries
            (B, N, h, d), keys and values (B, M, h, d).

    Returns:
        (B, N, h, d).
    """
    bias = None if bias is None else bias.contiguous()
    return _Attend.apply(bias, tiling, scale, N, *[native.side_by_side(x) for x in tokens])
