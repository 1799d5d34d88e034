"""Cascaded group attention in inference by the compiled library: a window at a time, all of its heads.

Shapes: B images, h heads, C channels of an H x W map, c = C / h, K channels of queries and keys, r native window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vizattn.attention import native
from vizattn.layers.conv_norm import ConvNorm, LinearNorm

__all__ = ["attend_cascade", "cascade_layers"]

#: As in cascade.cpp.
_MOST_HEADS = 8

#: CascadeTask in cascade.cpp: the map, biases, the result, and 6 tensors of two layers a head; kernels and 9 sizes.
_TASK = native.layout(3 + 2 * 6 * _MOST_HEADS, _MOST_HEADS + 9)

_PLAIN = (nn.Parameter, Tensor)
_PAIRS = {LinearNorm: (nn.Linear, nn.BatchNorm1d), ConvNorm: (nn.Conv2d, nn.BatchNorm2d)}

#: Weight and bias of a layer; scale, shift, mean and variance of its norm.
_Tensors = list[Tensor | None]


def _tensors(module: nn.Module, shape: tuple[int, ...], eps: set[float]) -> _Tensors | None:
    """Those of a layer, fused with its norm or not, or None if it is more than it seems to be."""
    parts = [module, *module._modules.values()] if type(module) in _PAIRS else [module]
    for part in parts:
        if part is None or part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return None
    layer: Any = parts[1] if len(parts) == 3 else parts[0]
    found = [*layer._parameters.values()]
    if len(parts) == 3:
        norm: Any = parts[2]
        if (type(layer), type(norm)) != _PAIRS[type(module)] or norm.training:
            return None
        eps.add(norm.eps)
        found += [*norm._parameters.values(), *norm._buffers.values()][:4]
        if found[-2] is None or found[-1] is None:  # no running statistics
            return None
    elif type(layer) in (nn.Linear, nn.Conv2d):
        found += [None] * 4
    if len(found) != 6 or found[0].shape[:2] != shape:
        return None
    if type(layer) is nn.Conv2d:
        height, width = found[0].shape[2:]
        same = height % 2 == 1 and height == width and layer.padding == (height // 2,) * 2
        if not same or (*layer.stride, *layer.dilation, layer.padding_mode) != (1, 1, 1, 1, "zeros"):
            return None
    for x in found:
        if x is not None and not (
            type(x) in _PLAIN and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and x.shape[0] == shape[0]
        ):
            return None
    return found


def cascade_layers(
    qkvs: Iterable[nn.Module], dws: Iterable[nn.Module], head_dim: int, key_dim: int
) -> tuple[float, list[_Tensors]] | None:
    """The eps of all norms and the tensors of all layers, or None where the library cannot do what they do."""
    eps: set[float] = set()
    layers = []
    for qkv, dw in zip(qkvs, dws):
        for module, shape in ((qkv, (2 * key_dim + head_dim, head_dim)), (dw, (key_dim, 1))):
            tensors = _tensors(module, shape, eps)
            if tensors is None:
                return None
            layers.append(tensors)
    watched = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    if len(layers) > 2 * _MOST_HEADS or len(eps) > 1 or watched:
        return None
    return eps.pop() if eps else 0.0, layers


def attend_cascade(
    x: Tensor,
    table: Tensor,
    window: tuple[int, int],
    native_window: int,
    key_dim: int,
    eps: float,
    layers: Sequence[_Tensors],
) -> Tensor:
    """The outputs of all heads behind ReLU: (B, C, H, W) -> the same, in the same layout.

    Args:
        x: The map.
        table: Biases by row and column of a distance, (h, r * r).
        window: Height and width of the windows, at most r; those at the end of the map may be smaller.
        native_window: r.
        key_dim: K.
        eps: Of the norms.
        layers: Two a head, those of queries, keys and values, (2 * K + c, c), and of queries, (K, 1, kernel, kernel).
    """
    B, C, H, W = x.shape
    side_by_side, table = x.contiguous(), table.contiguous()
    h, out = table.shape[0], torch.empty_like(side_by_side)
    none = _MOST_HEADS - h
    native.call(
        "cascade_forward",
        _TASK,
        eps,
        *native.addresses(side_by_side, table, out, *itertools.chain(*layers), *(None,) * 12 * none),
        *(*(conv.shape[-1] for conv, *_ in layers[1::2] if conv is not None), *(0,) * none),
        *(B, h, C // h, key_dim, H, W, *window, native_window),
    )
    return out if side_by_side is x else out.contiguous(memory_format=torch.channels_last)
