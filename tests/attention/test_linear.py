"""Linear attention against sums over pairs of tokens, in every type it meets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import LinearAttention, LocalConcentration, linear_attention


def naive(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor, min_sum: float) -> Tensor:
    """One query, one head, one sample at a time, the weight of every key written out."""
    B, h, N, _ = query.shape
    rows = []
    for b in range(B):
        for i in range(h):
            for n in range(N):
                weights = [(query[b, i, n].clamp(min=0) * key[b, i, m].clamp(min=0)).sum() for m in range(key.shape[2])]
                total = torch.stack(weights).sum()
                scaled = sum(w * temperature[i, 0, 0] * value[b, i, m] for m, w in enumerate(weights))
                rows.append(scaled / torch.where(total < min_sum, torch.full_like(total, min_sum), total))
    return torch.stack(rows).reshape(B, h, N, value.shape[-1])


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 2),
    h=st.integers(1, 3),
    N=st.integers(1, 5),
    M=st.integers(1, 6),
    d=st.integers(1, 4),
    min_sum=st.sampled_from([0.5, 2.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_function_equals_the_definition(B: int, h: int, N: int, M: int, d: int, min_sum: float, seed: int) -> None:
    inputs = [
        draw(seed, B, h, N, d),
        draw(seed + 1, B, h, M, d),
        draw(seed + 2, B, h, M, d + 1),
        draw(seed + 3, h, 1, 1),
    ]
    output, expected = linear_attention(*inputs, min_sum), naive(*inputs, min_sum)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(output)
    own, reference = (torch.autograd.grad((y * cotangent).sum(), inputs) for y in (output, expected))
    for a, b in zip(own, reference):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_all_ways_to_derive_agree(temperature: float | None) -> None:
    """Backward, twice, forward, by torch.func, and in part."""
    inputs = [draw(i, 2, 2, 5, 3) for i in range(3)]
    if temperature is not None:
        inputs.append(torch.full((2, 1, 1), temperature, dtype=torch.float64, requires_grad=True))

    def function(*inputs: Tensor) -> Tensor:
        return linear_attention(*inputs, min_sum=2.0)  # type: ignore[misc]  # some sums are above it

    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs)
    expected = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs)
    by_func = torch.func.grad(lambda *x: function(*x).pow(2).sum(), argnums=tuple(range(len(inputs))))(*inputs)
    for i, x in enumerate(inputs):
        alone = [y if y is x else y.detach() for y in inputs]
        torch.testing.assert_close(torch.autograd.grad(function(*alone).pow(2).sum(), x)[0], expected[i])
        torch.testing.assert_close(by_func[i], expected[i])


def test_backward_inside_autocast() -> None:
    inputs = [draw(i, 2, 2, 5, 3).float().detach().requires_grad_() for i in range(3)]
    expected = torch.autograd.grad(linear_attention(*inputs).sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(linear_attention(*inputs).sum(), inputs)
    for grad, expected_grad in zip(grads, expected):
        torch.testing.assert_close(grad, expected_grad)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 2), h=st.integers(1, 3), N=st.integers(1, 6), bias=st.booleans(), qk_norm=st.booleans())
def test_module_equals_the_definition(B: int, h: int, N: int, bias: bool, qk_norm: bool) -> None:
    torch.manual_seed(B + 10 * h + 100 * N)
    dim = 4 * h
    module = LinearAttention(dim, h, qkv_bias=bias, qk_norm=qk_norm, min_sum=1.5, dtype=torch.float64)
    with torch.no_grad():
        module.qkv.weight.mul_(3)
        module.temperature.add_(torch.rand(h, 1, 1))
    x = draw(5, B, N, dim)
    parts = []
    for i, weight in enumerate(module.qkv.weight.chunk(3)):
        shift = module.qkv.bias.chunk(3)[i] if bias else 0.0
        parts.append((x @ weight.T + shift).reshape(B, N, h, 4).transpose(1, 2))
    mixed = naive(module.q_norm(parts[0]), module.k_norm(parts[1]), parts[2], module.temperature, 1.5)
    expected = mixed.transpose(1, 2).reshape(B, N, dim) @ module.proj.weight.T + module.proj.bias
    output = module(x, (1, N))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, *module.parameters()]
    own, reference = (torch.autograd.grad(y.pow(2).sum(), inputs) for y in (output, expected))
    for a, b in zip(own, reference):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_does_not_overflow(dtype: torch.dtype, autocast: bool) -> None:
    """30,000 keys of size 4: their sums are beyond what float16 can hold."""
    torch.manual_seed(0)
    query, key, value = (torch.rand(1, 2, n, 8) + 3 for n in (5, 30_000, 30_000))
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    temperature = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    expected = linear_attention(query.double(), key.double(), value.double(), temperature)
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = linear_attention(query, key, value, temperature)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=2e-3 if dtype == torch.float16 else 2e-2, atol=0.0)


def test_sums_are_bounded_from_below() -> None:
    query = key = torch.full((1, 1, 2, 1), 2.0)
    value = torch.ones(1, 1, 2, 1)
    torch.testing.assert_close(linear_attention(query, key, value), torch.full((1, 1, 2, 1), 0.08))  # 8 / 100
    torch.testing.assert_close(linear_attention(query, key, value, min_sum=1.0), torch.ones(1, 1, 2, 1))
    assert torch.equal(linear_attention(-query, key, value), torch.zeros(1, 1, 2, 1))


def test_initial_temperature() -> None:
    module = LinearAttention(32, 2)
    assert torch.equal(module.temperature, torch.full((2, 1, 1), 0.25))


def test_local_concentration_is_depthwise_and_keeps_the_size() -> None:
    torch.manual_seed(0)
    module = LocalConcentration(3).eval()
    x = torch.randn(1, 3, 5, 9, requires_grad=True)
    output = module(x)
    assert output.shape == x.shape
    output[0, 1].sum().backward()
    assert x.grad is not None
    assert x.grad[0, 1].abs().sum() > 0
    assert not x.grad[0, [0, 2]].any()


def test_errors() -> None:
    with pytest.raises(VizattnError, match="10 cannot be split into 3 heads"):
        LinearAttention(10, 3)
    with pytest.raises(VizattnError, match="min_sum of linear attention must be positive, not 0"):
        LinearAttention(8, 2, min_sum=0)
