"""Cascaded group attention, arXiv:2305.07027: each head sees its share of the channels and what the head before found.

Shapes: B batch of windows, h heads, H x W map, N = H * W positions of a window, K = key_dim channels of queries and
keys, C channels of the map, c = C / h channels (and values) a head, r native window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.cascade_native import attend_cascade, cascade_layers
from vizattn.attention.native import LANES, usable
from vizattn.errors import VizattnError
from vizattn.layers.conv_norm import ConvNorm, LinearNorm
from vizattn.layers.eager import eager

__all__ = ["CascadedGroupAttention", "biased_attention", "offset_index"]


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, drop: float = 0.0) -> Tensor:
    """softmax(query key^T / sqrt(K) + bias) value for one head.

    The products are explicit: N is a window's few positions, and a learnt bias would keep torch's fused kernels for the
    CPU away in training.
    Time and memory are O(N^2) a window.

    Args:
        query: (B, N, K).
        key: (B, N, K).
        value: (B, N, c).
        bias: (N, N), or (B, N, N) where windows differ; -inf where nothing may be seen.
        drop: Share of attention weights set to zero.

    Returns:
        (B, N, c).
    """
    scores = torch.baddbmm(bias.to(query.dtype), query, key.transpose(1, 2), alpha=query.shape[2] ** -0.5)
    weights = scores.softmax(dim=-1)
    if drop > 0:
        weights = F.dropout(weights, drop)
    return weights @ value


def offset_index(height: int, width: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Where a table over (|dy|, |dx|) of `columns` columns, row by row, holds the bias of each pair: (N * N)."""
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    dy = (y[:, None] - y).abs()
    dx = (x[:, None] - x).abs()
    return (dy[:, None, :, None] * columns + dx[:, None, :]).flatten()


@register_notrace_module  # windows depend on the size of the map
class CascadedGroupAttention(nn.Module):
    """Attention in windows of a map; the heads form a cascade.

    Head i projects its c channels, plus the output of head i - 1, to queries, keys and values; queries pass a depthwise
    convolution; a bias by distance is added to the scores. All heads' outputs pass ReLU and the output projection.

    A map is cut into the fewest windows of at most r x r, all of one size; the last ones are filled up with positions
    that nobody sees (though in training they count in the statistics of the norms here). Biases belong to distances, so
    windows of any size use entries of the one table.
    It works on maps alone: there are no prefix tokens and no further keys and values.
    In float32 inference on a CPU, the compiled library computes a window at a time, from its channels to its outputs.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide `dim`.
        window_size: Native window r; the size of the table of biases.
        key_dim: Channels K.
        kernel_sizes: Of the depthwise convolutions, one a head at least.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, or there are fewer kernel sizes than heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        window_size: int = 7,
        key_dim: int = 16,
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        if len(kernel_sizes) < num_heads:
            raise VizattnError(f"{num_heads} heads need as many kernel sizes, not {len(kernel_sizes)}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.key_dim = key_dim
        self.head_dim = dim // num_heads
        self.qkvs = nn.ModuleList(
            LinearNorm(self.head_dim, 2 * key_dim + self.head_dim, **dd) for _ in range(num_heads)
        )
        self.dws = nn.ModuleList(
            ConvNorm(key_dim, key_dim, kernel, groups=key_dim, **dd)
            for _, kernel in zip(range(num_heads), kernel_sizes)
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = ConvNorm(dim, dim, bn_weight_init=0, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size**2, **dd))

    def _bias(self, height: int, width: int) -> Tensor:
        """The biases of all pairs in a window: (h, N, N)."""
        index = offset_index(height, width, self.window_size, self.attention_biases.device)
        N = height * width
        return self.attention_biases.index_select(1, index).view(-1, N, N)

    def _cascade(self, x: Tensor, bias: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), each a window; `valid` (B, H, W, 1) is 0 where there is only padding."""
        B, H, W, C = x.shape
        N = H * W
        if valid is not None:
            bias = bias[:, None].masked_fill(valid.reshape(B, 1, N) == 0, float("-inf"))
        parts = x.reshape(B * N, C).chunk(self.num_heads, dim=1)
        part = parts[0]
        outputs: list[Tensor] = []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws)):
            if i > 0:
                part = parts[i] + part
            query, key, value = qkv(part).view(B, N, -1).split([self.key_dim, self.key_dim, self.head_dim], dim=2)
            query = query.view(B, H, W, self.key_dim)
            if valid is not None:  # the convolution sees zeros beyond the border of the map
                query = query * valid
            query = dw(query.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(B, N, self.key_dim)
            part = biased_attention(query, key, value, bias[i], self.attn_drop.p if self.training else 0.0)
            part = part.reshape(B * N, self.head_dim)
            outputs.append(part)
        return torch.cat(outputs, dim=1).view(B, H, W, C)

    @torch.jit.unused
    def _by_library(self, x: Tensor, window: tuple[int, int]) -> Tensor | None:
        """The outputs of all heads behind ReLU, (B, C, H, W), if the compiled library can compute them."""
        if self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        table, size = self.attention_biases, self.window_size**2
        if self.key_dim % LANES or window == (1, 1) or not usable() or not eager(x, table):
            return None
        if not x.is_cpu or x.dtype is not torch.float32 or table.dtype is not torch.float32:
            return None
        if x.shape[1] != self.num_heads * self.head_dim or table.shape != (self.num_heads, size):
            return None
        layers = cascade_layers(self.qkvs, self.dws, self.head_dim, self.key_dim)
        if layers is None or len(layers[1]) != 2 * self.num_heads:
            return None
        return attend_cascade(x, table, window, self.window_size, self.key_dim, *layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        rows, columns = -(-H // self.window_size), -(-W // self.window_size)
        height, width = -(-H // rows), -(-W // columns)
        if not torch.jit.is_scripting():
            found = self._by_library(x, (height, width))
            if found is not None:
                return self.proj_drop(self.proj(found))
        bias = self._bias(height, width)
        x = x.permute(0, 2, 3, 1)  # no copy for a map in channels_last
        if rows * columns == 1:
            x = self._cascade(x, bias, None)
        else:
            pad = [0, 0, 0, columns * width - W, 0, rows * height - H]
            valid: Tensor | None = None
            if pad[3] + pad[5] > 0:
                valid = _to_windows(F.pad(x.new_ones(1, H, W, 1), pad).expand(B, -1, -1, -1), height, width)
                x = F.pad(x, pad)
            x = self._cascade(_to_windows(x, height, width), bias, valid)
            x = x.view(B, rows, columns, height, width, C).transpose(2, 3)
            x = x.reshape(B, rows * height, columns * width, C)[:, :H, :W]
        return self.proj_drop(self.proj(F.relu(x, inplace=True).permute(0, 3, 1, 2)))


def _to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, height, width, C)."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // height, height, W // width, width, C).transpose(2, 3)
    return x.reshape(-1, height, width, C)
