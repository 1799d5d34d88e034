"""Bi-level routing attention against loops over regions and tokens that follow the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vizattn import VizattnError
from vizattn.attention import BilevelRoutingAttention
from vizattn.attention.bilevel_routing import bilevel_routing_attention, route


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_size: tuple[int, int],
    region_size: tuple[int, int],
    topk: int,
    scale: float,
) -> Tensor:
    """One sample, one head, one query at a time; it knows no padding, for regions are lists of tokens."""
    (H, W), (rows, columns) = grid_size, region_size
    P, G = query.shape[2] - H * W, key.shape[2] - H * W
    regions: dict[tuple[int, int], list[int]] = {}
    for i in range(H):
        for j in range(W):
            regions.setdefault((i // rows, j // columns), []).append(i * W + j)
    outputs = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for b in range(query.shape[0]):
        means = [
            {
                name: torch.stack([x[b, :, first + t].flatten() for t in tokens]).mean(0)
                for name, tokens in regions.items()
            }
            for x, first in ((query.detach(), P), (key.detach(), G))
        ]
        allowed = {token: list(range(G + H * W)) for token in range(P)}
        for name, tokens in regions.items():
            best = sorted(regions, key=lambda other: -float(means[0][name] @ means[1][other]))[:topk]
            for token in tokens:
                allowed[P + token] = list(range(G)) + [G + t for other in best for t in regions[other]]
        for h in range(query.shape[1]):
            for n, keys in allowed.items():
                weights = (query[b, h, n] @ key[b, h, keys].T * scale).softmax(0)
                outputs[b, h, n] = weights @ value[b, h, keys]
    return outputs


def assert_same(outputs: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-11)
    cotangent = draw(9, *expected.shape).detach()
    grads = torch.autograd.grad((outputs * cotangent).sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * cotangent).sum(), inputs)):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 2),
    h=st.integers(1, 2),
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    topk=st.integers(1, 6),
    P=st.integers(0, 2),
    E=st.integers(0, 2),
    masked=st.booleans(),
    portion=st.sampled_from([1, 100, 10**9]),
    seed=st.integers(0, 999),
)
def test_function_equals_the_definition(
    B: int,
    h: int,
    H: int,
    W: int,
    rows: int,
    columns: int,
    topk: int,
    P: int,
    E: int,
    masked: bool,
    portion: int,
    seed: int,
) -> None:
    """Every path: over all tokens, masked, and with copies in one or more portions of query regions."""
    inputs = [
        draw(seed, B, h, P + H * W, 3),
        draw(seed + 1, B, h, E + P + H * W, 3),
        draw(seed + 2, B, h, E + P + H * W, 2),
    ]
    shape = ((H, W), (rows, columns), topk)
    expected = naive(*inputs, *shape, 0.3)
    limits = {"max_masked": 10**9 if masked else 0, "max_copied": portion}
    assert_same(bilevel_routing_attention(*inputs, *shape, scale=0.3, **limits), expected, inputs)


@settings(max_examples=10, deadline=None)
@given(
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    n_win=st.integers(1, 4),
    region_size=st.sampled_from([None, None, 2, 3]),
    topk=st.integers(1, 4),
    P=st.integers(0, 2),
    qk_norm=st.booleans(),
    bias=st.booleans(),
)
def test_module_equals_the_definition(
    H: int, W: int, n_win: int, region_size: int | None, topk: int, P: int, qk_norm: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    options = {"topk": topk, "n_win": n_win, "region_size": region_size}
    module = BilevelRoutingAttention(6, 2, qkv_bias=bias, qk_norm=qk_norm, dtype=torch.float64, **options)
    x = draw(1, 2, P + H * W, 6)
    query, key, value = (x @ module.qkv.weight.T + (module.qkv.bias if bias else 0)).chunk(3, dim=2)
    query, key, value = (y.unflatten(2, (2, 3)).transpose(1, 2) for y in (query, key, value))
    region = (region_size,) * 2 if region_size else (math.ceil(H / n_win), math.ceil(W / n_win))
    mixed = naive(module.q_norm(query), module.k_norm(key), value, (H, W), region, topk, 6**-0.5)
    mixed = mixed.transpose(1, 2).flatten(2)
    image = value[:, :, P:].transpose(2, 3).reshape(2, 6, H, W)
    local = F.conv2d(image, module.lepe.weight, module.lepe.bias, padding=2, groups=6).flatten(2).transpose(1, 2)
    mixed = torch.cat([mixed[:, :P], mixed[:, P:] + local], dim=1)
    expected = mixed @ module.proj.weight.T + module.proj.bias
    assert_same(module(x, (H, W)), expected, [x, *module.parameters()])


def test_routes_are_those_of_the_largest_products() -> None:
    """Two regions of 2 x 2 whose keys point along their own query and along the other's."""
    towards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    map_of = towards[[0, 0, 1, 1] * 2][None, None]
    assert route(map_of, map_of, (2, 4), (2, 2), 1).tolist() == [[[0], [1]]]
    assert route(map_of, map_of.flip(2), (2, 4), (2, 2), 1).tolist() == [[[1], [0]]]


def test_a_cut_off_region_weighs_as_much_as_a_whole_one() -> None:
    """Its mean is over the tokens it has: one token of the largest key beats four of a lesser one."""
    key = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0]).reshape(1, 1, 5, 1)
    assert route(torch.ones(1, 1, 5, 1), key, (1, 5), (1, 4), 1).tolist() == [[[1], [1]]]


@pytest.mark.parametrize("topk", [1, 4])
def test_regions_not_routed_to_have_no_influence(topk: int) -> None:
    """In values; keys and queries may turn the routes."""
    query, key, value = (draw(seed, 1, 1, 64, 4).detach() for seed in range(3))
    routed = route(query, key, (8, 8), (2, 2), topk)[0, 5].tolist()
    before = bilevel_routing_attention(query, key, value, (8, 8), (2, 2), topk)
    region = (torch.arange(8)[:, None] // 2 * 4 + torch.arange(8) // 2).flatten()
    own = region == 5
    inside = torch.isin(region, torch.tensor(routed))
    changed = bilevel_routing_attention(query, key, torch.where(inside[:, None], value, 7.0), (8, 8), (2, 2), topk)
    assert torch.equal(before[:, :, own], changed[:, :, own])
    changed = bilevel_routing_attention(query, key, torch.where(inside[:, None], 7.0, value), (8, 8), (2, 2), topk)
    torch.testing.assert_close(changed[:, :, own], torch.full_like(changed[:, :, own], 7.0))


def test_copies_are_bounded() -> None:
    """No tensor of a large map, forward or backward, is larger than one portion of copies (or the input's few)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
            return output

    inputs = [torch.randn(1, 2, 42 * 42, 8, requires_grad=True) for _ in range(3)]
    tokens = 42 * 42 * 16
    with Watch():
        bilevel_routing_attention(*inputs, (42, 42), (6, 6), 16, max_masked=0, max_copied=2 * tokens).sum().backward()
    assert largest <= 2 * tokens


def test_samples_choose_their_own_routes_and_drop_attention_in_training_only() -> None:
    torch.manual_seed(0)
    module = BilevelRoutingAttention(8, 2, topk=1, n_win=3, attn_drop=0.5)
    x = torch.randn(3, 81, 8)
    assert not torch.equal(module(x, (9, 9)), module(x, (9, 9)))
    module.eval()
    torch.testing.assert_close(module(x, (9, 9))[1:2], module(x[1:2], (9, 9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim 8 cannot be split into 3 heads"),
        ({"topk": 0}, "topk of bilevel_routing must be at least 1, not 0"),
        ({"n_win": -7}, "n_win of bilevel_routing must be at least 1, not -7"),
        ({"region_size": 0}, "region_size of bilevel_routing must be at least 1, not 0"),
    ],
)
def test_mistakes(options: dict[str, int], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        BilevelRoutingAttention(8, **options)


def test_routes_in_half_precision_do_not_overflow() -> None:
    """Means, not sums: with 64 tokens a region, products of sums are 4,096 times larger, and their largest tie."""
    query, key = (3 * torch.randn(1, 2, 32 * 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    query, key = query + 1, key + 1
    found, expected = (route(query.to(t), key.to(t), (32, 32), (8, 8), 4) for t in (torch.float16, torch.float64))
    assert (found.sort().values == expected.sort().values).float().mean() > 0.9
