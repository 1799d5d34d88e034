"""Scaled dot-product attention over all tokens, arXiv:1706.03762.

Shapes: B batch, N tokens, h heads, d channels a head, C = h * d.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from timm.layers import register_notrace_function, use_fused_attn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.native import usable
from vizattn.attention.tiles_native import attend_tile, attend_tiles, fit, one_tile
from vizattn.errors import VizattnError
from vizattn.layers.eager import eager

__all__ = ["SoftmaxAttention", "attention_weights", "packed_softmax_attention", "softmax_attention"]

#: Numbers of a head's keys at most, M * d: of more, torch's fused kernel was as fast as the library.
MOST = 1 << 16


@register_notrace_function  # paths depend on the input
def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale * query key^T) value, without the (N, M) matrix ever being stored.

    Time is O(N M C), memory O((N + M) C).

    Args:
        query: (B, h, N, d).
        key: (B, h, M, d).
        value: (B, h, M, e).
        dropout_p: Share of attention weights set to zero.
        scale: 1 / sqrt(d) if None.

    Returns:
        (B, h, N, e).
    """
    if not torch.jit.is_scripting() and dropout_p == 0 and _by_library([query, key, value]):
        return attend_tile(query, key, value, None, query.shape[-1] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)


@register_notrace_function
def packed_softmax_attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`softmax_attention` of tokens to each other, (B, N, 3, h, d) -> (B, N, h, d).

    Queries, keys and values that lie as one product gave them get one gradient that lies as it goes back there.
    """
    if not torch.jit.is_scripting() and dropout_p == 0 and _by_library([qkv]):
        N = qkv.shape[1]
        return attend_tiles(None, one_tile(N, N), qkv.shape[-1] ** -0.5, N, qkv)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return softmax_attention(query, key, value, dropout_p).transpose(1, 2)


@torch.jit.unused
def _by_library(tokens: list[Tensor]) -> bool:
    if torch.is_autocast_enabled("cpu") or not (eager(*tokens) and usable(*tokens)):
        return False
    if len(tokens) == 1:
        return 0 < tokens[0].shape[1] * tokens[0].shape[-1] <= MOST and tokens[0].numel() > 0
    query, key, value = tokens
    return fit(query, key, value) and query.numel() > 0 and 0 < key.shape[2] * key.shape[3] <= MOST


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The attention map itself, softmax(query key^T / sqrt(d)).

    Args:
        query: (B, h, N, d).
        key: (B, h, M, d).

    Returns:
        (B, h, N, M), rows sum to one.
    """
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention. It treats every token alike, so the grid is accepted (see the package) and not used.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries and keys are normalised a head, arXiv:2302.05442.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        norm_layer: The normalisation for `qk_norm`, called with the channels a head.

    Raises:
        VizattnError: `num_heads` does not divide `dim`.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C); every token may attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        dropout_p = self.attn_drop.p if self.training else 0.0
        raw_query, raw_key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(raw_query), self.k_norm(raw_key)
        if extra_kv is not None:
            key = torch.cat([key, extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2)
            value = torch.cat([value, extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2)
        if self.fused_attn and extra_kv is None and query is raw_query and key is raw_key:
            x = packed_softmax_attention(qkv, dropout_p).transpose(1, 2)
        elif self.fused_attn:
            x = softmax_attention(query, key, value, dropout_p)
        else:  # the map passes through a module, where hooks can read it
            x = self.attn_drop(attention_weights(query, key)) @ value
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))
