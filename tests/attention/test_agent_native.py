"""Agent attention by the compiled library against its definition, for all vectors."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import assert_same, doubled, draw
from threads import threads
from torch import Tensor

from vizattn.attention import native
from vizattn.attention.agent import agent_attention, agent_weights

pytestmark = pytest.mark.skipif(native.library is None, reason="vizattn was installed without a C++ compiler")

#: Few, and more than are taken of one head before the next.
TOKENS = st.integers(1, 70) | st.integers(129, 290)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    N=TOKENS,
    M=TOKENS,
    A=st.integers(1, 50),
    h=st.integers(1, 3),
    d=st.sampled_from([16, 32, 48]),
    biased=st.sampled_from(["", "key", "query", "both"]),
    packed=st.booleans(),
    steep=st.booleans(),
    lanes=st.sampled_from([4, 8, 16]),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_agents_equal_the_definition(
    B: int,
    N: int,
    M: int,
    A: int,
    h: int,
    d: int,
    biased: str,
    packed: bool,
    steep: bool,
    lanes: int,
    count: int,
    seed: int,
) -> None:
    """The greatest score may come late; `agent_weights` is held to loops by test_agent."""
    sizes = (M, M, M, A) if packed else (N, M, M, A)
    inputs = [draw(seed + i, B, h, n, d) for i, n in enumerate(sizes)]
    if packed:  # all heads of a token, and its query, key and value, lie together
        inputs[:3] = [draw(seed, B, M, 3, h, d)]
    shapes = {"key": (1, h, A, M), "query": (1, h, A, sizes[0])}
    names = [name for name in shapes if biased in (name, "both")]
    inputs += [draw(seed + 4 + i, *shapes[name]) for i, name in enumerate(names)]
    if steep:
        inputs[-1].data.mul_(300.0)
        inputs[-1].data[..., -1:] += 1000.0

    def parts(tensors: list[Tensor]) -> list[Tensor | None]:
        tokens = [*tensors[0].permute(2, 0, 3, 1, 4).unbind(0), *tensors[1:]] if packed else tensors
        given = dict(zip(names, tokens[4:]))
        return [*tokens[:4], given.get("key"), given.get("query")]

    wide = doubled(inputs)
    query, key, value, agents, key_bias, query_bias = parts(wide)
    over_keys, over_agents = agent_weights(query, key, agents, key_bias, query_bias)  # type: ignore[arg-type]
    expected = over_agents.transpose(-2, -1) @ (over_keys @ value)  # type: ignore[operator]
    with mock.patch.object(native, "_lanes", lanes), threads(count):
        output = agent_attention(*parts(inputs))  # type: ignore[arg-type]
        if not steep:
            assert_same(output, expected, inputs, wide)
        with torch.no_grad():
            assert torch.equal(agent_attention(*parts(inputs)), output)  # type: ignore[arg-type]
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-3 if steep else 1e-5)


def test_biases_of_many_agents_and_images_have_exact_gradients() -> None:
    """Those of rows and columns of a large map are sums of numbers of both signs that nearly cancel out."""
    H, W, h, A = 60, 70, 2, 49
    tokens = [draw(i, 3, h, n, 16) for i, n in enumerate((H * W, H * W, H * W, A))]
    biases = [draw(4, 1, h, A, H, 1), draw(5, 1, h, A, H, 1)]

    def grads(tokens: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
        key_bias, query_bias = (bias.expand(-1, -1, -1, H, W).flatten(3) for bias in biases)
        output = agent_attention(*tokens, key_bias, query_bias)  # type: ignore[arg-type]
        return torch.autograd.grad(output.pow(2).sum(), biases)

    for grad, expected in zip(grads(tokens, biases), grads(doubled(tokens), doubled(biases))):
        assert (grad - expected).norm() < 2e-5 * expected.norm()


def test_very_low_biases_hide_nothing_if_all_have_them() -> None:
    tokens = [draw(i, 1, 2, n, 16) for i, n in enumerate((40, 40, 40, 9))]
    biases = [torch.zeros(1, 2, 9, 40) for _ in range(2)]
    biases[0][:, :, 3], biases[1][..., 7] = -1.9e38, -1.9e38
    with native.unused():
        expected = agent_attention(*tokens, *biases)
    torch.testing.assert_close(agent_attention(*tokens, *biases), expected, rtol=1e-5, atol=1e-5)
    assert expected.isfinite().all()


def test_large_values_do_not_overflow_where_the_greatest_score_comes_late() -> None:
    query, key, value, agents = (draw(i, 1, 1, n, 16).detach() for i, n in enumerate((400, 400, 400, 9)))
    bias = torch.zeros(1, 1, 9, 400)
    bias[..., 64:] = 13.0
    output = agent_attention(query, key, value * 1e28, agents, bias)
    expected = agent_attention(query.double(), key.double(), value.double() * 1e28, agents.double(), bias.double())
    torch.testing.assert_close(output / 1e28, (expected / 1e28).float(), rtol=1e-5, atol=1e-5)
