"""Agent attention by the compiled library: both of its softmaxes in one call, without maps of them in memory.

Shapes: B images, N queries, M keys, A agents, h heads, d channels a head.
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

__all__ = ["attend_agents"]

#: AgentTask in agent.cpp: 16 tensors, steps of the 10 that have tokens, and 6 sizes.
_TASK = native.layout(16, 10 * 3 + 6)
_TENSORS, _NUMBERS = native.layout(16, 0), struct.Struct("@36q")


@functools.lru_cache(maxsize=256)
def _numbers(
    query: tuple[int, ...], agents: tuple[int, ...], M: int, *strides: tuple[int, ...]
) -> tuple[bytes, tuple[int, ...]]:
    """Steps and sizes of a forward pass, by shapes and the strides of queries, keys, values and agents; the output's.

    Kept, as over few tokens it is felt to put them together.
    """
    (B, h, N, d), A = query, agents[2]
    out = N * h * d, d, h * d, 1
    return _NUMBERS.pack(*[s for x in (*strides, out) for s in x[:3]], *[0] * 15, B, h, N, M, A, d), out


def _forward(tokens: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], kept: tuple[Tensor, ...]) -> Tensor:
    """(B, h, N, d), one token after another in memory."""
    query, key, _, agents = tokens
    shape, strides = query.shape, [x.stride() for x in tokens]
    numbers, of_out = _numbers(shape, agents.shape, key.shape[2], *strides)
    out = query.new_empty_strided(shape, of_out)
    tensors = [*native.addresses(*tokens, *biases), 0, out.data_ptr(), *(native.addresses(*kept) if kept else (0, 0))]
    native.call("agent_forward", _TENSORS, shape[3] ** -0.5, *tensors, 0, 0, 0, 0, 0, 0, numbers=numbers)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        tokens, biases = inputs[:4], inputs[4:]
        agents = tokens[3]
        # What agents collect; and for each the number taken off its scores, and one over the sum of the exponentials.
        kept = agents.new_empty(agents.shape), agents.new_empty(*agents.shape[:3], 2)
        out = _forward(tokens, biases, kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.plain = plain
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, collected, norms = ctx.saved_tensors
        if derived_again(grad):
            with torch.autocast("cpu", enabled=False):
                return None, *gradients_of(ctx.plain, inputs, grad)
        tokens, grad = [native.side_by_side(x) for x in inputs[:4]], native.readable(grad)
        biases = [None if bias is None else bias.contiguous() for bias in inputs[4:]]
        kept = collected.contiguous(), norms.contiguous()
        grads = [native.like(x) for x in tokens]
        new = torch.empty_like if len(grad) else torch.zeros_like  # written for the first image, added to for others
        d_biases = [
            new(bias) if bias is not None and needed else None for bias, needed in zip(biases, ctx.needs_input_grad[5:])
        ]
        native.call(
            "agent_backward",
            _TASK,
            tokens[0].shape[-1] ** -0.5,
            *native.addresses(*tokens, *biases, grad, None, *kept, *grads, *d_biases),
            *native.steps(*tokens, None, *grads, grad),
            *(*tokens[0].shape[:3], tokens[1].shape[2], *tokens[3].shape[2:]),
        )
        return None, *grads, *d_biases


def attend_agents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    key_bias: Tensor | None,
    query_bias: Tensor | None,
    plain: Callable[..., Tensor],
) -> Tensor:
    """What `plain` computes of the same: (B, h, N, d), (B, h, M, d) twice, (B, h, A, d), (1, h, A, M), (1, h, A, N)
    -> (B, h, N, d).

    It computes derivatives of derivatives, too.
    """
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1 or agents.stride(-1) != 1:
        query, key, value, agents = (native.side_by_side(x) for x in (query, key, value, agents))
    if key_bias is not None:
        key_bias = key_bias.contiguous()
    if query_bias is not None:
        query_bias = query_bias.contiguous()
    if torch.is_grad_enabled():
        return _Attend.apply(plain, query, key, value, agents, key_bias, query_bias)
    return _forward((query, key, value, agents), (key_bias, query_bias), ())
