"""Softmax attention against loops that follow the definition, and the choice of attention by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import set_fused_attn
from torch import Tensor, nn

from vizattn import VizattnError
from vizattn.attention import (
    ATTENTION,
    SoftmaxAttention,
    attention_class,
    attention_weights,
    softmax,
    softmax_attention,
)


def naive_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query, one head, one sample at a time."""
    B, h, N, d = query.shape
    rows = []
    for b in range(B):
        for i in range(h):
            for n in range(N):
                scores = [(query[b, i, n] * key[b, i, m]).sum() / math.sqrt(d) for m in range(key.shape[2])]
                total = sum(score.exp() for score in scores)
                rows.append(sum(score.exp() / total * value[b, i, m] for m, score in enumerate(scores)))
    return torch.stack(rows).reshape(B, h, N, value.shape[-1])


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    h=st.integers(1, 3),
    N=st.integers(1, 5),
    M=st.integers(1, 5),
    d=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_function_equals_the_definition(B: int, h: int, N: int, M: int, d: int, seed: int) -> None:
    query, key, value = draw(seed, B, h, N, d), draw(seed + 1, B, h, M, d), draw(seed + 2, B, h, M, d + 1)
    cotangent = draw(seed + 3, B, h, N, d + 1).detach()
    expected = naive_attention(query, key, value)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), [query, key, value])

    for output in (softmax_attention(query, key, value), attention_weights(query, key) @ value):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad((output * cotangent).sum(), [query, key, value])
        for grad, expected_grad in zip(grads, expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 2), h=st.integers(1, 3), N=st.integers(1, 5), qk_norm=st.booleans(), bias=st.booleans())
def test_module_equals_the_definition(B: int, h: int, N: int, qk_norm: bool, bias: bool) -> None:
    torch.manual_seed(B + 10 * h + 100 * N)
    dim = 4 * h
    module = SoftmaxAttention(dim, h, qkv_bias=bias, qk_norm=qk_norm, dtype=torch.float64)
    x = draw(5, B, N, dim)

    parts = []
    for weight, shift in zip(
        module.qkv.weight.chunk(3), module.qkv.bias.chunk(3) if bias else [torch.zeros(dim, dtype=torch.float64)] * 3
    ):
        parts.append((x @ weight.T + shift).reshape(B, N, h, 4).transpose(1, 2))
    query, key, value = module.q_norm(parts[0]), module.k_norm(parts[1]), parts[2]
    mixed = naive_attention(query, key, value).transpose(1, 2).reshape(B, N, dim)
    expected = mixed @ module.proj.weight.T + module.proj.bias

    inputs = [x, *module.parameters()]
    output = module(x, (1, N))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(output.pow(2).sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.pow(2).sum(), inputs)):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


def test_attention_map_can_be_read_when_not_fused() -> None:
    set_fused_attn(False)
    try:
        module = SoftmaxAttention(8, 2).eval()
    finally:
        set_fused_attn(True)
    maps: list[Tensor] = []
    module.attn_drop.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    x = torch.randn(2, 3, 8)
    output = module(x)
    assert maps[0].shape == (2, 2, 3, 3)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 3))
    fused = SoftmaxAttention(8, 2).eval()
    fused.load_state_dict(module.state_dict())
    torch.testing.assert_close(output, fused(x))


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_acts_in_training_only(fused: bool) -> None:
    torch.manual_seed(0)
    module = SoftmaxAttention(8, 2, attn_drop=0.5, proj_drop=0.0)
    module.fused_attn = fused
    x = torch.randn(1, 6, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(VizattnError, match="10 cannot be split into 3 heads"):
        SoftmaxAttention(10, 3)


def test_choice_by_name() -> None:
    assert attention_class("softmax") is SoftmaxAttention
    with pytest.raises(VizattnError, match="Unknown attention 'sofmax'\\. Did you mean 'softmax'"):
        attention_class("sofmax")


@pytest.mark.parametrize("name", ATTENTION)
def test_every_mechanism_keeps_the_protocol(name: str) -> None:
    module = ATTENTION[name](
        16,
        2,
        grid_size=(4, 4),
        num_prefix_tokens=2,
        qkv_bias=True,
        qk_norm=True,
        attn_drop=0.0,
        proj_drop=0.0,
        norm_layer=nn.LayerNorm,
        device="cpu",
        dtype=torch.float64,
    ).eval()
    for H, W, prefix in ((4, 4, 2), (3, 5, 2), (1, 1, 2), (4, 4, 7)):
        x = torch.randn(3, prefix + H * W, 16, dtype=torch.float64)
        output = module(x, (H, W))
        assert output.shape == x.shape
        torch.testing.assert_close(module(x[1:2], (H, W)), output[1:2])


@pytest.mark.parametrize("name", [name for name in ATTENTION if hasattr(ATTENTION[name], "project_kv")])
def test_extra_keys_and_values_equal_inserted_tokens(name: str) -> None:
    """Insert tokens in front, drop their outputs: the same outputs and gradients as with their keys and values."""
    torch.manual_seed(0)
    module = ATTENTION[name](16, 2, grid_size=(4, 4), num_prefix_tokens=2, qkv_bias=True, qk_norm=True).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    inputs = [draw(1, 1, 3, 16), *module.parameters()]
    for H, W, prefix in ((4, 4, 2), (3, 5, 2), (7, 6, 2), (1, 1, 2)):
        x = draw(2, 2, prefix + H * W, 16)
        outputs = (
            module(x, (H, W), module.project_kv(inputs[0])),  # type: ignore[operator]
            module(torch.cat([inputs[0].expand(2, -1, -1), x], dim=1), (H, W))[:, 3:],
        )
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-11)
        own, inserted = (torch.autograd.grad(y.pow(2).sum(), [x, *inputs], allow_unused=True) for y in outputs)
        for a, b in zip(own, inserted):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ATTENTION)
def test_every_mechanism_draws_its_own_parameters_anew(name: str) -> None:
    module = ATTENTION[name](16, 2, grid_size=(4, 4))
    own = dict(module.named_parameters(recurse=False))
    for parameter in own.values():
        torch.nn.init.constant_(parameter, float("nan"))
    if own:
        module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in own.values())


def test_symbolic_tracing_sees_plain_operations() -> None:
    module, x = SoftmaxAttention(32, 2).eval(), torch.randn(2, 5, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(module, {"extra_kv": None})(x), module(x))


def test_nested_tensors_and_many_tokens_are_left_to_torch() -> None:
    nested = [torch.nested.nested_tensor([torch.randn(2, n, 16) for n in (3, 5)]) for _ in range(3)]
    for found, *parts in zip(softmax_attention(*nested).unbind(), *(x.unbind() for x in nested)):
        torch.testing.assert_close(found, softmax_attention(*(x.unsqueeze(0) for x in parts)).squeeze(0))
    few, many = torch.randn(1, 1, 4096, 16), torch.randn(1, 1, 4097, 16)
    assert softmax._by_library([few] * 3) is (softmax.usable(few))
    assert not softmax._by_library([few, many, many])
