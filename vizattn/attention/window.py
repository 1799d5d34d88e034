"""Softmax attention inside windows of a map, plain or shifted, with or without biases by relative position.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021), arXiv:2103.14030.

Shapes: B batch, h heads, d channels a head, C = h * d; H x W patch tokens in n windows of L = height x width tokens;
P prefix tokens, N = P + H * W; E keys besides those of the window.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import (
    register_notrace_module,  # type: ignore[attr-defined]
    to_2tuple,
    trunc_normal_,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.native import usable
from vizattn.attention.softmax import softmax_attention
from vizattn.attention.tiles_native import attend_tile, fit
from vizattn.attention.window_native import attend_windows
from vizattn.errors import VizattnError
from vizattn.layers.eager import eager

__all__ = ["WindowAttention", "merge_windows", "partition_windows", "window_attention", "window_mask"]


def partition_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Cut maps into windows, row by row: (B, H, W, C) -> (B * n, L, C).

    A map that the window does not divide is filled up with zeros at the bottom and right, then rolled up and left by
    `shift`, so that what leaves at one border is in windows of the other.
    """
    B, H, W, C = x.shape
    bottom, right = -H % window[0], -W % window[1]
    if bottom > 0 or right > 0:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if shift[0] > 0 or shift[1] > 0:
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = x.reshape(B, (H + bottom) // window[0], window[0], (W + right) // window[1], window[1], C)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], C)


def merge_windows(
    x: Tensor, grid_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0)
) -> Tensor:
    """What `partition_windows` cut, without the padding: (B * n, L, C) -> (B, H, W, C)."""
    H, W = grid_size
    bottom, right = -H % window[0], -W % window[1]
    height, width, C = H + bottom, W + right, x.shape[-1]
    x = x.reshape(-1, height // window[0], width // window[1], window[0], window[1], C).transpose(2, 3)
    x = x.reshape(-1, height, width, C)
    if shift[0] > 0 or shift[1] > 0:
        x = torch.roll(x, shift, (1, 2))
    return x[:, :H, :W] if bottom > 0 or right > 0 else x


def window_mask(
    grid_size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    device: torch.device | None = None,
) -> Tensor | None:
    """Who may attend to whom in the windows of `partition_windows`.

    Tokens that meet only because the map was rolled do not see each other, and the padding is seen by padding alone
    (somebody must see it: a query without keys would be 0 / 0).

    Returns:
        (n, L, L), queries by keys; None if everybody may attend to all.
    """
    H, W = grid_size
    bottom, right = -H % window[0], -W % window[1]
    if bottom == 0 and right == 0 and shift[0] == 0 and shift[1] == 0:
        return None
    y = torch.arange(H + bottom, device=device) + shift[0]
    x = torch.arange(W + right, device=device) + shift[1]
    rolled = 2 * (y >= H + bottom).long()[:, None] + (x >= W + right).long()
    inside = (y % (H + bottom) < H)[:, None] & (x % (W + right) < W)
    tokens = torch.stack([rolled, inside.long()], dim=-1)[None]
    group, valid = partition_windows(tokens, window).unbind(-1)
    return (group[:, :, None] == group[:, None, :]) & (valid[:, :, None] <= valid[:, None, :])


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value in each window.

    Time is O(N C L) for N tokens in all; memory O(N C), and N L weights a head more in training with a bias where the
    compiled library is not used, as torch has no fused kernel for the CPU that gives the gradient of a bias.

    Keys and values past the window's own L have no bias and are never masked.

    Args:
        query: (B * n, h, L, d).
        key: (B * n, h, L + E, d).
        value: (B * n, h, L + E, e).
        bias: (h, L, L), the same for all windows, finite for some key of each query.
        mask: (n, L, L), False where a key must not be seen; the same for all samples and heads.
        dropout_p: Share of attention weights set to zero.

    Returns:
        (B * n, h, L, e).
    """
    E = key.shape[2] - query.shape[2]
    if not torch.jit.is_scripting() and mask is None and dropout_p == 0 and _by_library(query, key, value, bias):
        bias = None if bias is None else bias.transpose(-2, -1)
        return attend_tile(query, key, value, bias, query.shape[-1] ** -0.5)
    if bias is not None:
        bias = F.pad(bias, (0, E)).to(query.dtype)
    if mask is not None:
        mask = F.pad(mask, (0, E), value=1.0).unsqueeze(1)  # (n, 1, L, L + E)
    if bias is not None and bias.requires_grad:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        if mask is not None:
            scores = scores.unflatten(0, (-1, mask.shape[0])).masked_fill(~mask, float("-inf")).flatten(0, 1)
        weights = scores.softmax(dim=-1)
        return (F.dropout(weights, dropout_p) if dropout_p > 0 else weights) @ value
    if mask is not None:
        if bias is not None:
            mask = bias.masked_fill(~mask, float("-inf"))
        mask = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    elif bias is not None:
        mask = bias.unsqueeze(0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)


@torch.jit.unused
def _by_library(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    if torch.is_autocast_enabled("cpu") or not (eager(query, key, value, bias) and usable(query, key, value)):
        return False
    if not fit(query, key, value):
        return False
    h, L = query.shape[1:3]
    return key.shape[2] >= L and (bias is None or bias.shape == (h, L, L))


def _cut(x: Tensor, grid_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(B, H * W, h, d) -> (B * n, h, L, d)."""
    h, d = x.shape[2], x.shape[3]
    x = partition_windows(x.reshape(x.shape[0], grid_size[0], grid_size[1], h * d), window, shift)
    return x.unflatten(-1, (h, d)).transpose(1, 2)


@register_notrace_module  # padding depends on the size of the map
class WindowAttention(nn.Module):
    """Multi-head attention in windows of the map.

    Patch tokens attend to their window and to all prefix tokens, which have no position; prefix tokens attend to
    everything. A map that the windows do not divide ends in smaller windows, at the bottom and right; along a side no
    longer than the window there is one window, and no shift.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`.
        grid_size: Not used: no parameter depends on it.
        num_prefix_tokens: Not used either.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries and keys are normalised a head, arXiv:2302.05442.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        norm_layer: The normalisation for `qk_norm`, called with the channels a head.
        window_size: Height and width of a window, or one number for both.
        shift: Whether the windows are moved by half their size, so that their borders lie in the middle of those of an
            attention without shift.
        rel_pos_bias: Whether a learnt bias for each offset of query and key, and each head, is added to the scores.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, or `window_size` is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        window_size: int | tuple[int, int] = 7,
        shift: bool = False,
        rel_pos_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        height, width = to_2tuple(window_size)
        if height < 1 or width < 1:
            raise VizattnError(f"window_size of window attention must be at least 1, not {window_size}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = (height, width)
        self.shift = shift

        self.relative_position_bias_table = None
        if rel_pos_bias:
            table = torch.empty((2 * height - 1) * (2 * width - 1), num_heads, **dd)
            self.relative_position_bias_table = nn.Parameter(table)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the position biases anew."""
        if self.relative_position_bias_table is not None:
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value

    def _bias(self, height: int, width: int) -> Tensor | None:
        """The biases in a window of this size, at most the native one: (h, L, L)."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        y = torch.arange(height, device=table.device)
        x = torch.arange(width, device=table.device)
        dy = y[:, None] - y + self.window_size[0] - 1  # of query minus key
        dx = x[:, None] - x + self.window_size[1] - 1
        index = (dy[:, None, :, None] * (2 * self.window_size[1] - 1) + dx[:, None, :]).flatten()
        L = height * width
        return table.index_select(0, index).view(L, L, self.num_heads).permute(2, 0, 1).contiguous()

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int],
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, P + H * W, C) -> the same; every token may attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        H, W = grid_size
        P = N - H * W
        window = (min(self.window_size[0], H), min(self.window_size[1], W))
        shift = (0, 0)
        if self.shift:
            shift = (window[0] // 2 if window[0] < H else 0, window[1] // 2 if window[1] < W else 0)
        dropout_p = self.attn_drop.p if self.training else 0.0

        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        raw_query, raw_key, value = qkv.unbind(2)  # (B, N, h, d)
        query, key = self.q_norm(raw_query), self.k_norm(raw_key)
        if extra_kv is not None:
            extra_key, extra_value = extra_kv
            key = torch.cat([extra_key.to(key.dtype).expand(B, -1, -1, -1).transpose(1, 2), key], dim=1)
            value = torch.cat([extra_value.to(value.dtype).expand(B, -1, -1, -1).transpose(1, 2), value], dim=1)
        if torch.jit.is_scripting():
            y = self._attend_by_torch(query[:, P:], key, value, grid_size, window, shift, dropout_p)
        else:
            packed = extra_kv is None and query is raw_query and key is raw_key
            tokens = (qkv,) if packed else (query[:, P:], key, value)
            y = self._attend(tokens, grid_size, window, shift, dropout_p)
        if P > 0:
            prefix, keys, values = query[:, :P].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            prefix = softmax_attention(prefix, keys, values, dropout_p)
            y = torch.cat([prefix.transpose(1, 2).reshape(B, P, C), y], dim=1)
        return self.proj_drop(self.proj(y))

    @torch.jit.unused
    def _attend(
        self,
        tokens: tuple[Tensor, ...],
        grid_size: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
        dropout_p: float,
    ) -> Tensor:
        """Queries (B, H * W, h, d), keys and values (B, E + H * W, h, d), or qkv with more queries -> (B, H * W, C)."""
        table, N = self.relative_position_bias_table, grid_size[0] * grid_size[1]
        if dropout_p == 0 and eager(*tokens, table) and usable(*tokens):
            scale = self.head_dim**-0.5
            return attend_windows(table, self.window_size, grid_size, window, shift, scale, *tokens).flatten(2)
        query, key, value = tokens[0].unbind(2) if len(tokens) == 1 else tokens
        return self._attend_by_torch(query[:, query.shape[1] - N :], key, value, grid_size, window, shift, dropout_p)

    def _attend_by_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid_size: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
        dropout_p: float,
    ) -> Tensor:
        """Queries (B, H * W, h, d), keys and values (B, E + H * W, h, d) -> (B, H * W, C)."""
        B, E = query.shape[0], key.shape[1] - query.shape[1]
        other_key, other_value = key[:, :E].transpose(1, 2), value[:, :E].transpose(1, 2)
        query = _cut(query, grid_size, window, shift)
        key, value = _cut(key[:, E:], grid_size, window, shift), _cut(value[:, E:], grid_size, window, shift)
        if E > 0:
            n = query.shape[0] // B
            key = torch.cat([key, other_key.repeat_interleave(n, 0)], dim=2)
            value = torch.cat([value, other_value.repeat_interleave(n, 0)], dim=2)
        bias, mask = self._bias(window[0], window[1]), window_mask(grid_size, window, shift, query.device)
        y = window_attention(query, key, value, bias, mask, dropout_p).transpose(1, 2).flatten(2)
        return merge_windows(y, grid_size, window, shift).flatten(1, 2)
