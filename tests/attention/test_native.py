"""Attention by the compiled library against loops over its definition, in outputs and gradients, for all vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import assert_same, doubled, draw
from threads import threads
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vizattn import VizattnError
from vizattn.attention import bilevel_native, bilevel_routing, linear, linear_attention, na1d, na2d, na3d, native
from vizattn.attention import neighborhood_native as tiles
from vizattn.attention.agent import agent_attention
from vizattn.attention.bilevel_routing import bilevel_routing_attention
from vizattn.attention.softmax import packed_softmax_attention, softmax_attention
from vizattn.attention.tiles_native import Tiling, attend_tile, attend_tiles
from vizattn.attention.window import window_attention

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}

pytestmark = pytest.mark.skipif(native.library is None, reason="vizattn was installed without a C++ compiler")


@st.composite
def tilings(draw: Any) -> tuple[int, ...]:
    """Images, queries, keys, heads, channels, tiles, keys of a tile, masks, one for each head, keys of each image."""
    numbers = [(1, 3), (1, 40), (1, 30), (1, 5)]
    B, N, M, h = (draw(st.integers(*limits)) for limits in numbers)
    d = 16 * draw(st.integers(1, 4))
    masks = draw(st.integers(0, 3))
    return (
        B,
        N,
        M,
        h,
        d,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 25)),
        masks,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(
    case=tilings(),
    packed=st.booleans(),
    lanes=st.sampled_from([4, 8, 16]),
    count=st.integers(1, 4),
    empty=st.sampled_from([0, 128]),
    seed=st.integers(0, 999),
)
def test_tiles_equal_the_definition(case: Any, packed: bool, lanes: int, count: int, empty: int, seed: int) -> None:
    """Queries are dealt out to tiles, some of whose lanes have none; each tile has keys of its own."""
    B, N, M, h, d, T, most_keys, P, by_head, by_image = case
    M = max(N, M) if packed else M
    generator = torch.Generator().manual_seed(seed)
    q = N + -N % native.LANES + empty
    query_at = torch.full((T, q), -1)
    for tile, queries in enumerate(torch.randperm(N, generator=generator).tensor_split(T)):
        query_at[tile, torch.randperm(q, generator=generator)[: len(queries)]] = queries
    key_at = torch.rand(*((B, T, M) if by_image else (T, M)), generator=generator).argsort(-1)[..., :most_keys]
    s = key_at.shape[-1]
    key_at[..., 1:] = torch.where(torch.rand(key_at[..., 1:].shape, generator=generator) < 0.2, -1, key_at[..., 1:])
    mask_at = torch.randint(max(P, 1), (T,), generator=generator) if P else None
    inputs = [draw(seed, B, M, 3, h, d)] if packed else [draw(seed + i, B, (N, M, M)[i], h, d) for i in range(3)]
    bias = None
    if P:
        bias = draw(seed + 3, P, h if by_head else 1, s, q).detach()
        hidden = torch.rand(bias.shape, generator=generator) < 0.3
        hidden[:, :, 0] = False
        bias = bias.masked_fill(hidden, -torch.inf).requires_grad_()
    tiling = Tiling(query_at.int(), key_at.int(), None if mask_at is None else mask_at.int())
    scale = 1.5 * d**-0.5

    wide = doubled([*inputs, *([] if bias is None else [bias])])
    query, key, value = wide[0].unbind(2) if packed else wide[:3]
    query = query[:, query.shape[1] - N :]
    rows: list[list[Tensor]] = [[None] * N for _ in range(B)]  # type: ignore[list-item]
    for b in range(B):
        for tile in range(T):
            places = key_at[b, tile] if by_image else key_at[tile]
            keys = places[places >= 0]
            for lane, i in enumerate(query_at[tile].tolist()):
                if i < 0:
                    continue
                scores = torch.einsum("hd,khd->hk", query[b, i], key[b, keys]) * scale
                if bias is not None:
                    assert mask_at is not None
                    scores = scores + wide[-1][mask_at[tile], :, :, lane][:, places >= 0]
                rows[b][i] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[b, keys])
    expected = torch.stack([torch.stack(row) for row in rows])

    with mock.patch.object(native, "_lanes", lanes), threads(count):
        output = attend_tiles(bias, tiling, scale, N, *inputs)
        assert_same(output, expected, [*inputs, *([] if bias is None else [bias])], wide)
        with torch.no_grad():
            assert torch.equal(attend_tiles(bias, tiling, scale, N, *inputs), output)


@st.composite
def cases(draw: Any) -> tuple[tuple[int, ...], list[tuple[int, int, int, bool]]]:
    axes = draw(st.integers(1, 3))
    grid, options = [], []
    for _ in range(axes):
        k = draw(st.integers(2, {1: 9, 2: 5, 3: 3}[axes]))
        dilation = draw(st.integers(1, 4 - axes))
        grid.append(k * dilation + draw(st.integers(0, {1: 60, 2: 9, 3: 3}[axes])))
        options.append((k, draw(st.integers(1, k)), dilation, draw(st.booleans())))
    return tuple(grid), options


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 40) | st.integers(100, 150),
    M=st.integers(1, 40),
    h=st.integers(1, 3),
    d=st.sampled_from([16, 32]),
    biased=st.floats(0, 1) | st.none(),
    seed=st.integers(0, 999),
)
def test_one_tile_equals_the_definition(
    B: int, N: int, M: int, h: int, d: int, biased: float | None, seed: int
) -> None:
    """Some of the keys have a bias."""
    inputs = [draw(seed, B, h, N, d), draw(seed + 1, B, h, M, d), draw(seed + 2, B, h, M, d)]
    if biased is not None:
        inputs.append(draw(seed + 3, h, int(biased * M), N))
    wide = doubled(inputs)
    scores = wide[0] @ wide[1].transpose(-2, -1) * 0.3
    if biased is not None:
        scores = scores + F.pad(wide[3], (0, 0, 0, M - wide[3].shape[1])).transpose(-2, -1)
    output = attend_tile(*inputs[:3], None if biased is None else inputs[3], 0.3)
    assert_same(output, scores.softmax(-1) @ wide[2], inputs, wide)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 40) | st.integers(100, 150),
    h=st.integers(1, 3),
    d=st.sampled_from([16, 32]),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_tokens_that_attend_to_each_other_equal_the_definition(
    B: int, N: int, h: int, d: int, count: int, seed: int
) -> None:
    """As one product gives queries, keys and values, and apart."""
    packed = draw(seed, B, N, 3, h, d)
    (wide,) = doubled([packed])

    def apart(qkv: Tensor) -> Tensor:
        return softmax_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)

    calls = mock.Mock(wraps=native.call)
    with threads(count), mock.patch.object(native, "call", calls):
        for function in (packed_softmax_attention, apart):
            query, key, value = wide.permute(2, 0, 3, 1, 4).unbind(0)
            expected = (query @ key.transpose(-2, -1) * d**-0.5).softmax(-1) @ value
            assert_same(function(packed), expected.transpose(1, 2), [packed], [wide])
    assert [call.args[0] for call in calls.call_args_list] == ["tiles_forward", "tiles_backward"] * 2


@settings(max_examples=25, deadline=None)
@given(case=cases(), B=st.integers(1, 2), E=st.sampled_from([0, 2]), bias=st.booleans(), seed=st.integers(0, 999))
def test_neighborhoods_equal_the_definition(case: Any, B: int, E: int, bias: bool, seed: int) -> None:
    """The reference is held to loops by test_neighborhood."""
    grid, options = case
    h, d = 2, 16
    inputs = [draw(seed + i, B, *grid, h, d) for i in range(3)]
    if bias:
        inputs.append(draw(seed + 3, h, *(2 * k - 1 for k, *_ in options)))
    inputs += [draw(seed + 4 + i, B, E, h, d) for i in range(2 if E else 0)]
    wide = doubled(inputs)
    kernel_size, stride, dilation, is_causal = (list(option) for option in zip(*options))

    def attend(tensors: list[Tensor], backend: str) -> Tensor:
        query, key, value, *rest = tensors
        return FUNCTIONS[len(grid)](
            query,
            key,
            value,
            kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            rpb=rest.pop(0) if bias else None,
            additional_keys=rest[0] if E else None,
            additional_values=rest[1] if E else None,
            backend=backend,
        )

    assert_same(attend(inputs, "native"), attend(wide, "reference"), inputs, wide)


@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(4, 13),
    W=st.integers(4, 13),
    region_size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    topk=st.integers(1, 4),
    P=st.integers(0, 2),
    E=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_routed_regions_equal_the_definition(
    H: int, W: int, region_size: tuple[int, int], topk: int, P: int, E: int, seed: int
) -> None:
    """Regions may stick out of the map; what is done in float64 is held to loops by test_bilevel_routing."""
    B, h, d = 2, 2, 16
    inputs = [draw(seed + i, B, h, (0 if i == 0 else E) + P + H * W, d) for i in range(3)]
    wide, shape = doubled(inputs), ((H, W), region_size, topk)
    with mock.patch.object(bilevel_routing, "_native_is_best", lambda query, *_: query.dtype == torch.float32):
        outputs = [bilevel_routing_attention(*x, *shape, scale=0.2) for x in (inputs, wide)]
    assert_same(*outputs, inputs, wide)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    h=st.integers(1, 5),
    N=st.integers(1, 70),
    M=st.integers(1, 70),
    d=st.sampled_from([16, 32, 48]),
    e=st.sampled_from([16, 32, 48]),
    factor=st.booleans(),
    min_sum=st.sampled_from([1.0, 100.0]),
    lanes=st.sampled_from([4, 8, 16]),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_linear_attention_equals_the_definition(
    B: int, h: int, N: int, M: int, d: int, e: int, factor: bool, min_sum: float, lanes: int, count: int, seed: int
) -> None:
    """What is done in float64 is held to loops by test_linear."""
    inputs = [draw(seed, B, N, h, d).transpose(1, 2), draw(seed + 1, B, h, M, d), draw(seed + 2, B, h, M, e)]
    inputs = [x.detach().requires_grad_() for x in [*inputs, *([draw(seed + 3, h, 1, 1)] if factor else [])]]
    wide = doubled(inputs)
    with (
        mock.patch.object(native, "_lanes", lanes),
        threads(count),
        mock.patch.object(linear, "attend_linear", wraps=linear.attend_linear) as used,
    ):
        outputs = [linear_attention(*x[:3], x[3] if factor else None, min_sum) for x in (inputs, wide)]
        assert used.call_count == 1
        assert_same(*outputs, inputs, wide)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_exponentials(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two keys the first has the score 0, the second x: its weight is e^x / (1 + e^x), down to the least floats."""
    monkeypatch.setattr(native, "_lanes", lanes)
    x = torch.cat([torch.linspace(-100, 0, 999), torch.tensor([-87.0, -1e4, -1e30, -torch.inf, 0.5, 80, 1e4, 1e30])])
    N = len(x)
    query, key, value = torch.zeros(1, N, 1, 16), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)
    query[..., 0, 0], key[0, 1, 0, 0], value[0, 1, 0] = x, 1, 1
    query_at = torch.nn.functional.pad(torch.arange(N), (0, -N % 16), value=-1).view(1, -1).int()
    bias = torch.where(x.isinf(), -torch.inf, 0.0)
    bias = torch.stack([torch.zeros(N), bias])
    bias = torch.nn.functional.pad(bias, (0, -N % 16))[None, None]
    query[0, x.isinf(), 0, 0] = 0
    weight = attend_tiles(bias, Tiling(query_at, torch.tensor([[0, 1]]).int(), None), 1.0, N, query, key, value)
    torch.testing.assert_close(weight[0, :, 0, 5].double(), x.double().sigmoid(), rtol=5e-6, atol=2e-38)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_whose_exponentials_leave_the_range_of_floats(sign: int) -> None:
    query, key, value = (draw(i, 1, 30, 1, 16).detach() for i in range(3))
    query[..., 0], key[..., 0] = 40, sign * 100
    inputs = [x.requires_grad_() for x in (query, key, value)]
    wide = doubled(inputs)
    output, expected = na1d(*inputs, 5, backend="native"), na1d(*wide, 5, backend="reference")
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)  # scores are exact to 2e-4
    cotangent = draw(9, *expected.shape).detach()
    expected_grads = torch.autograd.grad(expected, wide, cotangent.double())
    for grad, expected_grad in zip(torch.autograd.grad(output, inputs, cotangent), expected_grads):
        assert (grad.double() - expected_grad).norm() < 1e-3 * expected_grad.norm()


def test_strides_of_views_and_tensors_that_are_not_dense() -> None:
    whole = draw(0, 2, 3, 2, 9, 8, 16)
    views = [x.permute(0, 2, 3, 1, 4) for x in whole.unbind(1)]  # heads before the grid
    expanded = draw(1, 1, 9, 8, 2, 16).expand(2, -1, -1, -1, -1)
    for inputs in (views, [views[0], expanded, views[2]]):
        copies = [x.detach().clone().contiguous().requires_grad_() for x in inputs]
        output, expected = (na2d(*x, 3, backend="native") for x in (inputs, copies))
        assert torch.equal(output, expected)
        (grad,) = torch.autograd.grad(output.pow(2).sum(), whole)
        expected_grads = torch.autograd.grad(expected.pow(2).sum(), copies)
        assert torch.equal(grad[:, 0].permute(0, 2, 3, 1, 4), expected_grads[0])


def test_it_is_chosen_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 8, 8, 2, 16)
    with mock.patch.object(tiles, "attend_tiles", wraps=attend_tiles) as used:
        na2d(query, query, query, 3)
        assert used.call_count == 1
        for other in (query.double(), query[..., :8], query.to("meta")):
            na2d(other, other, other, 3)
        for backend in ("tiled", "reference"):
            na2d(query, query, query, 3, backend=backend)
        monkeypatch.setattr(native, "library", None)
        na2d(query, query, query, 3)
        assert used.call_count == 1


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 8, 8, 2, 8)
    with pytest.raises(
        VizattnError, match="'native' cannot be used here: it takes float32 on a CPU, with a multiple of 16"
    ):
        na2d(query, query, query, 3, backend="native")
    monkeypatch.setattr(native, "library", None)
    with pytest.raises(
        VizattnError, match="'native' cannot be used here: vizattn was installed without a C\\+\\+ compiler"
    ):
        na2d(query, query, query, 3, backend="native")


def _neighborhoods(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
    backend = "reference" if query.dtype == torch.float64 else "native"
    return na2d(*(x.unflatten(2, (5, 6)).movedim(1, 3) for x in (query, key, value)), 3, rpb=rpb, backend=backend)


def _linear(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    return linear_attention(query, key, value, table[:, :1, :1], min_sum=20.0)


def _agents(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """The agents are made of queries, as they are in a model."""
    bias = table.flatten(1).repeat(1, 6).view(1, 2, 5, 30)
    return agent_attention(query, key, value, query[:, :, ::6], bias, 2 * bias)


def _windows(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    bias = table.flatten(1).repeat(1, 36).view(2, 30, 30)
    return window_attention(query, key, value, bias)


def _all(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    key = key * table.flatten()[:16]
    if query.dtype == torch.float64:  # torch's kernel has no second derivatives
        return (query @ key.transpose(-2, -1) / 4).softmax(-1) @ value
    return softmax_attention(query, key, value)


@pytest.mark.parametrize("function", [_neighborhoods, _linear, _windows, _agents, _all])
def test_derivatives_of_derivatives_and_several_at_once(function: Callable[..., Tensor]) -> None:
    inputs = [draw(i, 1, 2, 30, 16) for i in range(3)] + [draw(3, 2, 5, 5)]
    wide = doubled(inputs)

    def penalty(tensors: list[Tensor]) -> Tensor:
        grads = torch.autograd.grad(function(*tensors).pow(2).sum(), tensors, create_graph=True)
        return torch.stack([grad.pow(2).sum() for grad in grads]).sum()

    grads, expected = (torch.autograd.grad(penalty(x), x) for x in (inputs, wide))
    for grad, expected_grad in zip(grads, expected):
        assert (grad.double() - expected_grad).norm() < 1e-5 * expected_grad.norm()

    output = function(*inputs)
    cotangents = torch.randn(2, *output.shape)
    batched = torch.autograd.grad(output, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        for grad, expected_grad in zip(batched, torch.autograd.grad(output, inputs, cotangent, retain_graph=True)):
            torch.testing.assert_close(grad[i], expected_grad, rtol=1e-4, atol=1e-5)
    mapped = torch.func.vmap(lambda c: torch.autograd.grad(output, inputs, c, retain_graph=True))
    if function is not _linear:  # whose own function of torch's operations has no rule for it
        for grads, same in zip(mapped(cotangents), batched):
            torch.testing.assert_close(grads, same, rtol=1e-4, atol=1e-5)
    before = function(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        # Others are computed in bfloat16 there.
        output_inside = function(*inputs) if function in (_neighborhoods, _linear) else before
        inside = torch.autograd.grad(output_inside, inputs, cotangents[0])
    for a, b in zip(inside, torch.autograd.grad(output, inputs, cotangents[0])):
        assert torch.equal(a, b)


def test_defaults_of_torch_do_not_matter() -> None:
    tiles._tables.cache_clear()
    bilevel_native._tokens.cache_clear()
    images = [draw(i, 1, 8, 8, 2, 16).detach() for i in range(3)]
    tokens = [x.flatten(1, 2).transpose(1, 2) for x in images]
    tokens = [torch.cat([x[:, :, :1], x], dim=2) for x in tokens]

    def attend() -> list[Tensor]:
        return [na2d(*images, 3), bilevel_routing_attention(*tokens, (8, 8), (4, 4), 2), linear_attention(*tokens)]

    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = attend()
    finally:
        torch.set_default_dtype(torch.float32)
    with native.unused():
        expected = attend()
    for outputs in (found, attend()):
        for output, right in zip(outputs, expected):
            torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-5)


def test_other_shapes_are_computed_by_torch() -> None:
    """Heads that share keys, values of other channels: what broadcasts there, and what is refused."""
    query, key, value = draw(0, 2, 4, 64, 16), draw(1, 2, 1, 64, 16), draw(2, 1, 1, 64, 16)
    with native.unused():
        expected = linear_attention(query, key, value, min_sum=1.0)
    torch.testing.assert_close(linear_attention(query, key, value, min_sum=1.0), expected)
    with pytest.raises(RuntimeError):
        linear_attention(query, draw(3, 2, 4, 64, 32), query)
    assert bilevel_routing_attention(query, query, query.repeat(1, 1, 1, 2), (8, 8), (4, 4), 2).shape == (2, 4, 64, 32)
    with pytest.raises(RuntimeError):
        bilevel_routing_attention(query, query, value, (8, 8), (4, 4), 2)


@pytest.mark.parametrize(
    ("keys", "queries"),
    [((1, 2, 9, 1), None), (None, (1, 2, 9, 1)), ((1, 1, 9, 40), (1, 2, 9, 40)), ((1, 2, 9, 30), None)],
)
def test_other_biases_of_agents_are_added_by_torch(
    keys: tuple[int, ...] | None, queries: tuple[int, ...] | None
) -> None:
    query, agents = draw(0, 2, 2, 40, 16), draw(1, 2, 2, 9, 16)
    biases = [None if shape is None else draw(2, *shape) for shape in (keys, queries)]

    def attend() -> Tensor:
        return agent_attention(query, query, query, agents, *biases)

    if keys == (1, 2, 9, 30):
        with pytest.raises(RuntimeError):
            attend()
        return
    with native.unused():
        expected = attend()
    torch.testing.assert_close(attend(), expected, rtol=1e-5, atol=1e-5)


def test_types_under_autocast_and_no_keys() -> None:
    query, none = draw(0, 2, 2, 40, 16), torch.zeros(2, 2, 0, 16)
    calls = [
        lambda: window_attention(query, query, query),
        lambda: agent_attention(query, query, query, query[:, :, :4]),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            assert call().dtype == torch.bfloat16
    for inputs in ((query, none, none, query), (query, query, query, none)):
        with native.unused():
            expected = agent_attention(*inputs)
        assert torch.equal(agent_attention(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighborhoods_of_narrow_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = [draw(i, 2, 9, 8, 2, 16).detach().to(dtype).requires_grad_() for i in range(3)] + [draw(3, 2, 5, 5)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    cotangent = draw(4, 2, 9, 8, 2, 16).detach().to(dtype)
    output, expected = na2d(*inputs[:3], 3, rpb=inputs[3]), na2d(*wide[:3], 3, rpb=wide[3])
    assert torch.equal(output, expected.to(dtype))
    grads = torch.autograd.grad(output, inputs, cotangent)
    for x, grad, right in zip(inputs, grads, torch.autograd.grad(expected, wide, cotangent.float())):
        assert torch.equal(grad, right.to(x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(na2d(*inputs[:3], 3, rpb=inputs[3]), output)


@pytest.mark.parametrize("function", [_linear, _windows, _agents])
def test_gradients_that_torch_has_not_written_down(function: Callable[..., Tensor]) -> None:
    inputs = [draw(i, 1, 2, 30, 16) for i in range(3)] + [draw(3, 2, 5, 5)]
    cotangent = draw(4, 1, 2, 30, 16).detach()
    expected = torch.autograd.grad(function(*inputs), inputs, -cotangent)
    for grad, right in zip(torch.autograd.grad(function(*inputs), inputs, torch._neg_view(cotangent)), expected):
        assert torch.equal(grad, right)
    zeros = torch._efficientzerotensor(cotangent.shape)
    assert not any(grad.any() for grad in torch.autograd.grad(function(*inputs), inputs, zeros))


def test_gradients_where_scores_are_large() -> None:
    """What all keys of a query share must not reach its gradient, though it is a thousand times larger."""
    inputs = [draw(i, 1, 64, 1, 16).detach() for i in range(3)]
    inputs[0][..., 0], inputs[1][..., 0] = 100, 400
    inputs = [x.requires_grad_() for x in inputs]
    cotangent, wide = draw(9, 1, 64, 1, 16).detach(), doubled(inputs)
    expected = torch.autograd.grad(na1d(*wide, 7, backend="reference"), wide, cotangent.double())
    errors = {}
    for backend in ("native", "reference"):
        grads = torch.autograd.grad(na1d(*inputs, 7, backend=backend), inputs, cotangent)
        errors[backend] = [float((grad - right).norm() / right.norm()) for grad, right in zip(grads, expected)]
    assert all(ours < 2 * theirs for ours, theirs in zip(errors["native"], errors["reference"])), errors


@pytest.mark.parametrize("function", [_neighborhoods, _linear, _windows, _agents])
def test_what_is_saved_may_come_back_in_another_layout(function: Callable[..., Tensor]) -> None:
    inputs = [draw(i, 1, 2, 30, 16) for i in range(3)] + [draw(3, 2, 5, 5)]
    cotangent = draw(9, 1, 2, 30, 16).detach()
    if function is _neighborhoods:
        cotangent = cotangent.transpose(1, 2).unflatten(1, (5, 6))
    expected = torch.autograd.grad(function(*inputs), inputs, cotangent)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda x: x):
        output = function(*inputs)
    for grad, right in zip(torch.autograd.grad(output, inputs, cotangent), expected):
        assert torch.equal(grad, right)


def test_compilers_see_plain_operations_though_it_was_asked_for() -> None:
    query = draw(0, 1, 8, 8, 2, 16).detach()

    def attend(x: Tensor) -> Tensor:
        return na2d(x, x, x, 3, backend="native")

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), attend(query))


def test_it_is_not_used_where_operations_are_counted() -> None:
    query = draw(0, 1, 8, 8, 2, 16)
    with FlopCounterMode(display=False) as counter:
        na2d(query, query, query, 3, backend="auto")
        linear_attention(*[query.flatten(1, 2).transpose(1, 2)] * 3)
    assert counter.get_total_flops() >= 2 * 2 * 64 * 2 * 16 * 16


def test_it_can_be_left_unused_between_forward_and_backward() -> None:
    query = draw(0, 1, 8, 8, 2, 16)
    expected = torch.autograd.grad(na2d(query, query, query, 3).sum(), query)
    output = na2d(query, query, query, 3).sum()
    with native.unused():
        assert torch.equal(torch.autograd.grad(output, query)[0], expected[0])
        assert native.library is None
    assert native.library is not None


def test_it_can_be_left_unused() -> None:
    command = [sys.executable, "-c", "from vizattn.attention import native; print(native.library)"]
    done = subprocess.run(
        command, env={**os.environ, "VIZATTN_NATIVE": "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"


def test_threads_that_share_biases() -> None:
    """Eight heads have one table of biases: what they add to its gradients must not be lost."""
    inputs = [draw(i, 2, 4096, 8, 16) for i in range(3)]
    bias = draw(3, 1, 1, 64, 16)
    tiling = Tiling(torch.arange(4096).view(-1, 16).int(), torch.arange(64).expand(256, -1).int().contiguous(), None)
    grads = []
    for count in (1, 4, 4, 4):
        with threads(count):
            output = attend_tiles(bias, tiling, 0.25, 4096, *inputs)
            grads.append(torch.autograd.grad(output.pow(2).sum(), [bias, *inputs]))
    for several in grads[1:]:
        for grad, expected in zip(several, grads[0]):
            assert torch.equal(grad, expected)
