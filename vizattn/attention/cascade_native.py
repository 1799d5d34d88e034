"""Cascaded group attention in inference by the compiled library: a window at a time, all of its heads.

Shapes: B images, h heads, C channels of an H x W map, c = C / h, K channels of queries and keys, r native window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vizattn.attention import native
from vizattn.layers.conv_norm import ConvNorm, LinearNorm
from vizattn.layers.eager import eager, watched

__all__ = ["attend_cascade", "cascade_layers"]

#: As in cascade.cpp.
_MOST_HEADS = 8

#: CascadeTask in cascade.cpp: the map, biases, the result, and 6 tensors of two layers a head; kernels and 9 sizes.
_TASK = native.layout(3 + 2 * 6 * _MOST_HEADS, _MOST_HEADS + 9)

_PAIRS = {LinearNorm: (nn.Linear, nn.BatchNorm1d), ConvNorm: (nn.Conv2d, nn.BatchNorm2d)}

#: Weight and bias of a layer; scale, shift, mean and variance of its norm.
_Tensors = list[Tensor | None]


def _tensors(module: nn.Module, shape: tuple[int, int], eps: set[float]) -> _Tensors | None:
    """Those of a layer, fused with its norm or not, or None if it is more than it seems to be."""
    parts: list[Any] = [module]
    if type(module) in _PAIRS:
        parts += module._modules.values()
        if tuple(map(type, parts[1:])) != _PAIRS[type(module)]:  # type: ignore[index]
            return None
    elif type(module) not in (nn.Linear, nn.Conv2d):
        return None
    if watched(*parts):
        return None
    layer = parts[0] if len(parts) == 1 else parts[1]
    try:
        found = [layer._parameters[name] for name in ("weight", "bias")]
        if len(parts) == 1:
            found += [None] * 4
        else:
            norm = parts[2]
            eps.add(norm.eps)
            found += [norm._parameters[name] for name in ("weight", "bias")]
            found += [norm._buffers[name] for name in ("running_mean", "running_var")]
            if norm.training or found[4] is None or found[5] is None:
                return None
    except KeyError:  # computed from others, or an attribute
        return None
    weight = found[0]
    if weight is None or weight.shape[:2] != shape or not _readable(weight):
        return None
    if any(x is not None and not (x.shape == shape[:1] and _readable(x)) for x in found[1:]):
        return None
    if type(layer) is nn.Conv2d:
        height, width = weight.shape[2:]
        same = height % 2 == 1 and height == width and layer.padding == (height // 2,) * 2
        if not same or (*layer.stride, *layer.dilation, layer.padding_mode) != (1, 1, 1, 1, "zeros"):
            return None
    return found


def _readable(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided and x.is_contiguous()


def cascade_layers(
    qkvs: Iterable[nn.Module], dws: Iterable[nn.Module], head_dim: int, key_dim: int
) -> tuple[float, list[_Tensors]] | None:
    """The eps of all norms and the tensors of all layers, or None where the library cannot do what they do."""
    eps: set[float] = set()
    layers: list[_Tensors] = []
    for qkv, dw in zip(qkvs, dws):
        for module, shape in ((qkv, (2 * key_dim + head_dim, head_dim)), (dw, (key_dim, 1))):
            tensors = _tensors(module, shape, eps)
            if tensors is None:
                return None
            layers.append(tensors)
    if len(layers) > 2 * _MOST_HEADS or len(eps) > 1 or not eager(*itertools.chain(*layers)):
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
    none, kernels = _MOST_HEADS - h, [weight.shape[-1] for weight, *_ in layers[1::2]]  # type: ignore[union-attr]
    native.call(
        "cascade_forward",
        _TASK,
        eps,
        *native.addresses(side_by_side, table, out, *itertools.chain(*layers), *(None,) * 12 * none),
        *(*kernels, *(0,) * none),
        *(B, h, C // h, key_dim, H, W, *window, native_window),
    )
    return out if side_by_side is x else out.contiguous(memory_format=torch.channels_last)
