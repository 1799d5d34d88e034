"""Softmax attention of tiles of queries to gathered keys, by the compiled library.

Shapes: B images, T tiles of q queries and s keys, N queries, M keys, h heads, d channels a head, P masks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vizattn.attention import native
from vizattn.layers.eager import derived_again, gradients_of

__all__ = ["Tiling", "attend_tile", "attend_tiles", "fit", "one_tile"]


#: Task in tiles.cpp: 13 tensors, steps of the 7 that have tokens, and 9 sizes.
_TASK = native.layout(13, 7 * 3 + 9)


class Tiling(NamedTuple):
    """Which queries attend to which keys."""

    query_at: Tensor  # (T, q) int32: queries, -1 for none
    key_at: Tensor  # (T, s) int32: keys, each once in a tile, -1 for none; or (B, T, s)
    mask_at: Tensor | None  # (T,) int32: which of the P masks; None: the only one
    once: bool = False  # whether each of the keys is in one tile


def _sizes(tiling: Tiling, bias: Tensor | None, out: Tensor) -> tuple[int, ...]:
    """Of the task: images, heads, channels, tiles, queries and keys of one, heads of biases, step of key_at, once."""
    key_at = tiling.key_at
    bias_heads, key_at_step = 1 if bias is None else bias.shape[1], key_at.stride(0) if key_at.dim() == 3 else 0
    return out.shape[0], *out.shape[2:], *tiling.query_at.shape, key_at.shape[-1], bias_heads, key_at_step, tiling.once


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


def _forward(bias: Tensor | None, tiling: Tiling, scale: float, N: int, *tokens: Tensor) -> Tensor:
    parts = _split(tokens, N)
    B, _, h, d = parts[1].shape
    out = tokens[0].new_empty(B, N, h, d)
    native.call(
        "tiles_forward",
        _TASK,
        scale,
        *native.addresses(*parts, bias, None, out, None, None, None, None, *tiling[:3]),
        *native.steps(*parts, out, None, None, None),
        *_sizes(tiling, bias, out),
    )
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, tiling: Tiling, scale: float, N: int, *tokens: Tensor) -> Tensor:
        out = _forward(bias, tiling, scale, N, *tokens)
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
        bias, grad = None if bias is None else bias.contiguous(), native.readable(grad)
        tokens = [native.side_by_side(x) for x in tokens]
        # Each query is in one tile, and its gradient written once; so are others', if each key is.
        keys = ctx.tiling.once
        once = [True, keys, keys] if len(tokens) == 3 else [keys and tokens[0].shape[1] == ctx.N]
        grads = [native.like(x) if o else native.like(x).zero_() for x, o in zip(tokens, once)]
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[0] else None
        parts, d_parts = _split(tokens, ctx.N), _split(grads, ctx.N)
        native.call(
            "tiles_backward",
            _TASK,
            ctx.scale,
            *native.addresses(*parts, bias, grad, None, *d_parts, d_bias, *ctx.tiling[:3]),
            *native.steps(*parts, grad, *d_parts),
            *_sizes(ctx.tiling, bias, grad),
        )
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
    attend = _Attend.apply if torch.is_grad_enabled() else _forward
    return attend(bias, tiling, scale, N, *[native.side_by_side(x) for x in tokens])


@functools.lru_cache(maxsize=64)
def one_tile(queries: int, keys: int) -> Tiling:
    """All queries attend to all keys."""
    with torch.inference_mode(False):
        query_at, key_at = (torch.arange(n, dtype=torch.int32, device="cpu")[None] for n in (queries, keys))
        return Tiling(F.pad(query_at, (0, -queries % native.LANES), value=-1), key_at, None, once=True)


def fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether shapes are those of `attend_tile`, nothing being broadcast."""
    return query.dim() == 4 and key.shape == value.shape and query[:, :, :0].shape == key[:, :, :0].shape


def attend_tile(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """All queries attend to all keys: (B, h, N, d), (B, h, M, d) twice, a bias (h or 1, K, N) -> (B, h, N, d).

    The bias is that of the first K keys; others have none. Time is O(N M h d).
    """
    N, M = query.shape[2], key.shape[2]
    if bias is not None:
        lanes, keys = -N % native.LANES, M - bias.shape[1]
        bias = (F.pad(bias, (0, lanes, 0, keys)) if lanes or keys else bias).float().unsqueeze(0)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attend_tiles(bias, one_tile(N, M), scale, N, query, key, value).transpose(1, 2)
