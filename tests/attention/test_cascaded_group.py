"""Cascaded group attention against loops over positions and heads, written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn import VizattnError
from vizattn.attention import CascadedGroupAttention, biased_attention
from vizattn.attention.cascaded_group import offset_index


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def norm(x: Tensor, bn: nn.Module) -> Tensor:
    return (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


def naive(module: CascadedGroupAttention, x: Tensor) -> Tensor:
    """One sample, one window, one head, one query at a time, on windows cut off at the border: there is no padding."""
    B, C, H, W = x.shape
    r, K, c = module.window_size, module.key_dim, module.head_dim
    heights, widths = math.ceil(H / math.ceil(H / r)), math.ceil(W / math.ceil(W / r))
    result = []
    for b in range(B):
        rows = {}
        for top in range(0, H, heights):
            for left in range(0, W, widths):
                window = x[b, :, top : top + heights, left : left + widths]
                places = [(i, j) for i in range(window.shape[1]) for j in range(window.shape[2])]
                found: list[Tensor] = []
                for h in range(module.num_heads):
                    tokens = torch.stack([window[h * c : (h + 1) * c, i, j] for i, j in places])
                    if h > 0:
                        tokens = tokens + found[-1]
                    tokens = norm(tokens @ module.qkvs[h].linear.weight.T, module.qkvs[h].bn)
                    query, key, value = tokens[:, :K], tokens[:, K : 2 * K], tokens[:, 2 * K :]
                    kernel = module.dws[h].conv.weight[:, 0]
                    half = kernel.shape[-1] // 2
                    mixed = []
                    for i, j in places:
                        near = [
                            kernel[:, k - i + half, m - j + half] * query[n]
                            for n, (k, m) in enumerate(places)
                            if abs(k - i) <= half and abs(m - j) <= half
                        ]
                        mixed.append(norm(sum(near), module.dws[h].bn))
                    out = []
                    for (i, j), q in zip(places, mixed):
                        bias = [module.attention_biases[h, abs(i - k) * r + abs(j - m)] for k, m in places]
                        weights = (key @ q / math.sqrt(K) + torch.stack(bias)).softmax(0)
                        out.append(weights @ value)
                    found.append(torch.stack(out))
                together = torch.cat(found, dim=1).relu() @ module.proj.conv.weight[:, :, 0, 0].T
                for n, (i, j) in enumerate(places):
                    rows[top + i, left + j] = norm(together[n], module.proj.bn)
        result.append(torch.stack([rows[i, j] for i in range(H) for j in range(W)]).T.reshape(C, H, W))
    return torch.stack(result)


def module_with(window_size: int, num_heads: int, kernel_sizes: tuple[int, ...]) -> CascadedGroupAttention:
    torch.manual_seed(window_size + 10 * num_heads)
    module = CascadedGroupAttention(
        3 * num_heads, num_heads, window_size, key_dim=4, kernel_sizes=kernel_sizes, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value), alpha=0.5)
    return module


@example(B=2, H=6, W=1, window_size=4, num_heads=2, seed=0)
@example(B=1, H=7, W=3, window_size=3, num_heads=1, seed=0)
@settings(max_examples=10, deadline=None)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 7),
    W=st.integers(1, 5),
    window_size=st.integers(1, 5),
    num_heads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_module_equals_the_definition(B: int, H: int, W: int, window_size: int, num_heads: int, seed: int) -> None:
    module = module_with(window_size, num_heads, (5, 3, 3))
    x, cotangent = draw(seed, B, 3 * num_heads, H, W), draw(seed + 1, B, 3 * num_heads, H, W).detach()
    inputs = [x, *module.parameters()]
    expected, output = naive(module, x), module(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), inputs, allow_unused=True)
    grads = torch.autograd.grad((output * cotangent).sum(), inputs, allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)


def test_memory_layout_does_not_matter() -> None:
    module = module_with(3, 2, (3, 3))
    x = draw(0, 2, 6, 5, 7).detach()
    torch.testing.assert_close(module(x.contiguous(memory_format=torch.channels_last)), module(x))


def test_biased_attention_equals_softmax() -> None:
    query, key, value, bias = draw(0, 2, 5, 4), draw(1, 2, 5, 4), draw(2, 2, 5, 3), draw(3, 5, 5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(biased_attention(query, key, value, bias), expected, rtol=1e-10, atol=1e-12)
    torch.manual_seed(0)
    dropped = biased_attention(query, key, torch.ones_like(value), bias, drop=0.5)
    assert not torch.allclose(dropped, torch.ones_like(dropped))


def test_offsets_in_a_larger_table() -> None:
    index = offset_index(2, 3, columns=4).view(2, 3, 2, 3)
    assert index[1, 2, 0, 0] == 1 * 4 + 2
    assert index[0, 0, 1, 2] == 1 * 4 + 2
    assert index[0, 1, 0, 2] == 1


def test_dropout_acts_in_training_only() -> None:
    module = CascadedGroupAttention(8, 2, attn_drop=0.5)
    nn.init.ones_(module.proj.bn.weight)
    x = torch.randn(2, 8, 5, 5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_mistakes() -> None:
    with pytest.raises(VizattnError, match="10 cannot be split into 3 heads"):
        CascadedGroupAttention(10, 3)
    with pytest.raises(VizattnError, match="4 heads need as many kernel sizes, not 2"):
        CascadedGroupAttention(16, 4, kernel_sizes=(3, 3))
