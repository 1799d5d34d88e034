"""Multiply-adds, counted while they are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["count_macs"]


def _forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _convolution_backward(grad: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """As many as forward for each of the gradients of input and weight; torch's formula is blind to groups."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = args
    return (wanted[0] + wanted[1]) * conv_flop_count(x, weight, grad, transposed=transposed)


def _add_product(_sum: Any, a: Any, b: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


# What torch's counter leaves out or gets wrong, by shapes.
_FURTHER: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.baddbmm_: _add_product,
}


def count_macs(call: Callable[[], object]) -> float:
    """Multiply-adds of the products and convolutions of one call, backward passes and recomputation included."""
    counter = FlopCounterMode(display=False, custom_mapping=_FURTHER)
    with counter:
        call()
    return counter.get_total_flops() / 2
