"""Counting of multiply-adds, where torch's own counter is wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vizattn.bench.macs import count_macs


def test_fused_attention_on_the_cpu_counts() -> None:
    x = torch.randn(1, 2, 16, 8)
    with torch.inference_mode():
        assert count_macs(lambda: F.scaled_dot_product_attention(x, x, x)) == 2 * 2 * 16 * 16 * 8
    x.requires_grad_(True)
    step = count_macs(lambda: F.scaled_dot_product_attention(x, x, x).sum().backward())
    assert step >= 3 * 2 * 2 * 16 * 16 * 8  # and the scores once more


def test_gradients_of_grouped_convolutions_cost_twice_the_convolution() -> None:
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.randn(1, 8, 6, 6, requires_grad=True)
    forward = 8 * 36 * 9
    with torch.no_grad():
        assert count_macs(lambda: layer(x)) == forward
    assert count_macs(lambda: layer(x).sum().backward()) == 3 * forward
    assert count_macs(lambda: layer(x.detach()).sum().backward()) == 2 * forward  # none for the input


def test_products_added_in_place_count() -> None:
    a = torch.randn(2, 3, 4)
    assert count_macs(lambda: torch.zeros(2, 3, 3).baddbmm_(a, a.transpose(1, 2))) == 2 * 3 * 3 * 4
