"""Agent attention against loops that follow the definition, with biases resized one position at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import set_fused_attn
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import AgentAttention, agent_attention, agent_weights


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def naive_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value for one head of one sample, one query at a time."""
    rows = []
    for n in range(len(query)):
        scores = [(query[n] * key[m]).sum() / math.sqrt(query.shape[1]) + bias[n, m] for m in range(len(key))]
        total = sum(score.exp() for score in scores)
        rows.append(sum(score.exp() / total * value[m] for m, score in enumerate(scores)))
    return torch.stack(rows)  # type: ignore[arg-type]


def sources(size: int, old: int, i: int) -> list[tuple[int, float]]:
    """Bilinear resizing with pixels as areas: where place i of `size` comes from in `old`, with weights."""
    centre = max((i + 0.5) * old / size - 0.5, 0.0)
    low = math.floor(centre)
    return [(low, 1 - (centre - low)), (min(low + 1, old - 1), centre - low)]


def at(table: Tensor, size: tuple[int, int], y: int, x: int) -> Tensor:
    """The value at (y, x) of a table (rows, columns) resized to `size`."""
    return sum(  # type: ignore[return-value]
        weight_y * weight_x * table[row, column]
        for row, weight_y in sources(size[0], table.shape[0], y)
        for column, weight_x in sources(size[1], table.shape[1], x)
    )


def naive_module(module: AgentAttention, x: Tensor, grid: tuple[int, int], extra: Tensor | None = None) -> Tensor:
    """`AgentAttention`, one sample and one head at a time; `extra` (E, C) are normed tokens that are keys only."""
    (B, N, C), (H, W), h, side = x.shape, grid, module.num_heads, module.pool_size
    P, d, A = N - H * W, C // h, side * side
    own = module.num_prefix_tokens
    outputs = []
    for b in range(B):
        qkv = module.qkv(x[b])
        heads = []
        for i in range(h):
            query, key, value = (part[:, i * d : (i + 1) * d] for part in qkv.chunk(3, dim=1))
            query, key = module.q_norm(query), module.k_norm(key)
            patches = query[P:].reshape(H, W, d)
            agents = torch.stack(
                [
                    patches[r * H // side : -(-(r + 1) * H // side), c * W // side : -(-(c + 1) * W // side)].mean(
                        (0, 1)
                    )
                    for r in range(side)
                    for c in range(side)
                ]
            )
            key_bias = torch.zeros(A, N, dtype=x.dtype)
            query_bias = torch.zeros(N, A, dtype=x.dtype)
            for a in range(A):
                for n in range(N):
                    if n >= P:
                        y, z = (n - P) // W, (n - P) % W
                        key_bias[a, n] = (
                            at(module.an_bias[i, a], grid, y, z)
                            + at(module.ah_bias[0, i, a], (H, 1), y, 0)
                            + at(module.aw_bias[0, i, a], (1, W), 0, z)
                        )
                        query_bias[n, a] = (
                            at(module.na_bias[i, a], grid, y, z)
                            + at(module.ha_bias[0, i, :, :, a], (H, 1), y, 0)
                            + at(module.wa_bias[0, i, :, :, a], (1, W), 0, z)
                        )
                    elif n >= P - own and module.ac_bias is not None and module.ca_bias is not None:
                        key_bias[a, n] = module.ac_bias[0, i, a, n - (P - own)]
                        query_bias[n, a] = module.ca_bias[0, i, n - (P - own), a]
            local = torch.zeros(N, d, dtype=x.dtype)
            kernel = module.dwc.weight[i * d : (i + 1) * d, 0]
            for n in range(P, N):
                y, z = (n - P) // W, (n - P) % W
                local[n] = module.dwc.bias[i * d : (i + 1) * d]  # type: ignore[index]
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < H and 0 <= z + dx < W:
                            local[n] = local[n] + kernel[:, dy + 1, dx + 1] * value[P + (y + dy) * W + z + dx]
            if extra is not None:
                more = module.qkv(extra).reshape(len(extra), 3, h, d)[:, :, i]
                key, value = torch.cat([key, module.k_norm(more[:, 1])]), torch.cat([value, more[:, 2]])
                key_bias = torch.cat([key_bias, torch.zeros(A, len(extra), dtype=x.dtype)], dim=1)
            collected = naive_attention(agents, key, value, key_bias)
            heads.append(naive_attention(query, agents, collected, query_bias) + local)
        outputs.append(module.proj(torch.cat(heads, dim=1)))
    return torch.stack(outputs)


def disturbed(module: AgentAttention) -> AgentAttention:
    """The module in float64, with weights far from their initial values."""
    module = module.double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(draw(i, *parameter.shape) * 0.4)
    return module


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 2),
    h=st.integers(1, 2),
    N=st.integers(1, 5),
    M=st.integers(1, 4),
    A=st.integers(1, 3),
    d=st.integers(1, 3),
    biased=st.booleans(),
    seed=st.integers(0, 999),
)
def test_function_equals_the_definition(
    B: int, h: int, N: int, M: int, A: int, d: int, biased: bool, seed: int
) -> None:
    query, key, value, agents = (
        draw(seed, B, h, N, d),
        draw(seed + 1, B, h, M, d),
        draw(seed + 2, B, h, M, d + 1),
        draw(seed + 3, B, h, A, d),
    )
    biases = (draw(seed + 4, 1, h, A, M), draw(seed + 5, 1, h, A, N)) if biased else ()
    key_bias, query_bias = biases or (torch.zeros(1, h, A, M).double(), torch.zeros(1, h, A, N).double())
    expected = torch.stack(
        [
            torch.stack(
                [
                    naive_attention(
                        query[b, i],
                        agents[b, i],
                        naive_attention(agents[b, i], key[b, i], value[b, i], key_bias[0, i]),
                        query_bias[0, i].T,
                    )
                    for i in range(h)
                ]
            )
            for b in range(B)
        ]
    )
    output = agent_attention(query, key, value, agents, *biases)
    with torch.no_grad():
        unlearnt = agent_attention(query, key, value, agents, *biases)
    for found in (output, unlearnt):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    inputs, cotangent = [query, key, value, agents, *biases], draw(seed + 6, B, h, N, d + 1).detach()
    grads = torch.autograd.grad((output * cotangent).sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * cotangent).sum(), inputs)):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("grid", "native", "agents", "prefix", "own", "extra"),
    [
        ((2, 3), (2, 3), 4, 0, 0, 0),  # native, agents that do not divide the map
        ((3, 2), (5, 4), 4, 1, 1, 0),  # smaller than native, class token
        ((4, 3), (2, 2), 1, 3, 1, 2),  # larger, tokens of an adapter in front, extra keys
        ((1, 1), (3, 3), 9, 2, 2, 1),  # fewer places than agents
        ((3, 1), (3, 2), 4, 0, 1, 0),  # the class token left out
        ((8, 1), (8, 1), 4, 2, 0, 0),  # larger than the 7 x 7 table along one side, unknown prefix tokens
    ],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_module_equals_the_definition(
    grid: tuple[int, int],
    native: tuple[int, int],
    agents: int,
    prefix: int,
    own: int,
    extra: int,
    qk_norm: bool,
) -> None:
    module = disturbed(
        AgentAttention(4, 2, native, num_prefix_tokens=own, qkv_bias=True, qk_norm=qk_norm, num_agents=agents)
    )
    x, more = draw(50, 2, prefix + grid[0] * grid[1], 4), draw(51, 1, extra, 4)
    output = module(x, grid, module.project_kv(more) if extra else None)
    expected = naive_module(module, x, grid, more[0] if extra else None)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    module.requires_grad_(False)
    frozen = module(x, grid, module.project_kv(more) if extra else None)
    torch.testing.assert_close(frozen, expected, rtol=1e-10, atol=1e-12)
    expected_grad = torch.autograd.grad(expected.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen.sum(), x)[0], expected_grad, rtol=1e-8, atol=1e-10)
    module.requires_grad_()

    inputs = [x, *module.parameters(), *([more] if extra else [])]
    grads = torch.autograd.grad(output.pow(2).sum(), inputs, allow_unused=True)
    expected_grads = torch.autograd.grad(expected.pow(2).sum(), inputs, allow_unused=True, materialize_grads=True)
    for grad, expected_grad in zip(grads, expected_grads):
        grad = torch.zeros_like(expected_grad) if grad is None else grad
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10)


def test_weights_sum_to_one() -> None:
    query, key, agents = draw(0, 2, 3, 7, 4), draw(1, 2, 3, 5, 4), draw(2, 2, 3, 4, 4)
    over_keys, over_agents = agent_weights(query, key, agents)
    assert over_keys.shape == (2, 3, 4, 5)
    assert over_agents.shape == (2, 3, 4, 7)
    torch.testing.assert_close(over_keys.sum(3), torch.ones(2, 3, 4).double())
    torch.testing.assert_close(over_agents.sum(2), torch.ones(2, 3, 7).double())


def test_both_maps_can_be_read_when_not_fused() -> None:
    set_fused_attn(False)
    try:
        module = AgentAttention(8, 2, (3, 4), num_agents=4).eval()
    finally:
        set_fused_attn(True)
    maps: list[tuple[int, ...]] = []
    module.attn_drop.register_forward_hook(lambda _module, _inputs, output: maps.append(tuple(output.shape)))
    x = torch.randn(1, 12, 8)
    output = module(x, (3, 4))
    module.fused_attn = True
    torch.testing.assert_close(module(x, (3, 4)), output)
    assert sorted(maps) == [(1, 2, 4, 12), (1, 2, 4, 12)]


def test_derivatives_by_torch_func() -> None:
    module = disturbed(AgentAttention(8, 2, (3, 4), num_agents=4))
    x = draw(0, 1, 12, 8)
    expected = torch.autograd.grad(module(x, (3, 4)).pow(2).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: module(x, (3, 4)).pow(2).sum())(x), expected)
    tangent = torch.func.jvp(lambda x: module(x, (3, 4)).pow(2).sum(), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, expected.sum())


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_acts_in_training_only(rates: tuple[float, float]) -> None:
    torch.manual_seed(0)
    module = AgentAttention(8, 2, (3, 3), attn_drop=rates[0], proj_drop=rates[1], num_agents=4)
    x = torch.randn(1, 9, 8)
    assert not torch.equal(module(x, (3, 3)), module(x, (3, 3)))
    module.eval()
    assert torch.equal(module(x, (3, 3)), module(x, (3, 3)))


def test_another_native_map_changes_no_output_there() -> None:
    module = disturbed(AgentAttention(8, 2, (4, 4), num_prefix_tokens=1, num_agents=4))
    module.ah_bias.requires_grad_(False)
    x = draw(0, 2, 1 + 3 * 6, 8)
    before = module(x, (3, 6))
    module.set_grid_size((3, 6))
    torch.testing.assert_close(module(x, (3, 6)), before, rtol=1e-12, atol=1e-12)
    assert module.ah_bias.shape == (1, 2, 4, 3, 1)
    assert module.wa_bias.shape == (1, 2, 1, 6, 4)
    assert not module.ah_bias.requires_grad
    assert module.aw_bias.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "8 cannot be split into 3 heads"),
        ({"num_agents": 50}, "num_agents must be a square number .* not 50"),
        ({"num_agents": 0}, "num_agents must be a square number .* not 0"),
        ({"grid_size": None}, "needs grid_size"),
    ],
)
def test_mistakes(kwargs: dict[str, int | None], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        AgentAttention(8, **{"num_heads": 2, "grid_size": (4, 4), **kwargs})  # type: ignore[arg-type]
