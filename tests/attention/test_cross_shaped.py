"""Cross-shaped attention against its definition, query by query, in outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import CrossShapedAttention


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def naive(module: CrossShapedAttention, x: Tensor, H: int, W: int) -> Tensor:
    """One sample, head and query after the other; the convolution is a sum over the 3 x 3 places around."""
    B, _, C = x.shape
    branches, h = module.num_branches, module.num_heads
    d, width = C // h, C // branches
    query, key, value = module.qkv(x).chunk(3, dim=-1)
    rows = []
    for n in range(H * W):
        y, u = divmod(n, W)
        parts = []
        for branch in range(branches):
            # Which places are in the stripe of this query: all, those of its columns, those of its rows.
            side, place, axis = module.split_size, (u, y)[branch], (1, 0)[branch]
            stripe = [m for m in range(H * W) if branches == 1 or divmod(m, W)[axis] // side == place // side]
            local = module.lepes[branch].bias.expand(B, -1)
            for m in stripe:
                v, w = divmod(m, W)
                if abs(v - y) <= 1 and abs(w - u) <= 1:
                    kernel = module.lepes[branch].weight[:, 0, v - y + 1, w - u + 1]
                    local = local + value[:, m, branch * width : (branch + 1) * width] * kernel
            heads = []
            for head in range(branch * h // branches, (branch + 1) * h // branches):
                part = slice(head * d, (head + 1) * d)
                scores = (key[:, stripe, part] * query[:, n : n + 1, part]).sum(-1) * d**-0.5
                heads.append((scores.softmax(-1)[..., None] * value[:, stripe, part]).sum(1))
            parts.append(torch.cat(heads, dim=-1) + local)
        rows.append(torch.cat(parts, dim=-1))
    return module.proj(torch.stack(rows, dim=1))


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 6),
    W=st.integers(1, 6),
    split=st.integers(1, 4),
    branches=st.integers(1, 2),
)
def test_module_equals_the_definition(B: int, H: int, W: int, split: int, branches: int) -> None:
    torch.manual_seed(0)
    module = CrossShapedAttention(8, 4, split, branches, dtype=torch.float64)
    x = draw(1, B, H * W, 8)
    output, expected = module(x, (H, W)), naive(module, x, H, W)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    inputs, cotangent = [x, *module.parameters()], draw(2, *output.shape).detach()
    grads = torch.autograd.grad((output * cotangent).sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * cotangent).sum(), inputs)):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("branches", [1, 2])
def test_extra_keys_are_seen_from_every_stripe(branches: int) -> None:
    """A key far off in another stripe, given as an extra key, counts as in attention over these keys alone."""
    torch.manual_seed(0)
    module = CrossShapedAttention(8, 4, 2, branches, dtype=torch.float64)
    for lepe in module.lepes:
        torch.nn.init.zeros_(lepe.weight)
        torch.nn.init.zeros_(lepe.bias)
    x, prompts = draw(0, 2, 1, 8), draw(1, 2, 3, 8)
    together = torch.cat([x, prompts], dim=1)
    query, key, value = module.qkv(together).reshape(2, 4, 3, 4, 2).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, :1], key, value)
    expected = module.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, (1, 1), module.project_kv(prompts)), expected)


def test_mistakes() -> None:
    with pytest.raises(VizattnError, match="dim 10 cannot be split into 4 heads"):
        CrossShapedAttention(10, 4)
    with pytest.raises(VizattnError, match="3 heads cannot be split into 2 branches"):
        CrossShapedAttention(9, 3)
    with pytest.raises(VizattnError, match="split_size of cross-shaped attention must be at least 1, not 0"):
        CrossShapedAttention(8, 2, split_size=0)
