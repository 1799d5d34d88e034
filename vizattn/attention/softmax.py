"""Scaled dot-product attention over all tokens, arXiv:1706.03762.

Shapes: B batch, N tokens, h heads, d channels a head, C = h * d.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.errors import VizattnError

__all__ = ["SoftmaxAttention", "attention_weights", "softmax_attention"]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, without the (N, M) matrix ever being stored.

    Time is O(N M C), memory O((N + M) C).

    Args:
        query: (B, h, N, d).
        key: (B, h, M, d).
        value: (B, h, M, e).
        dropout_p: Share of attention weights set to zero.

    Returns:
        (B, h, N, e).
    """
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)


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
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if extra_kv is not None:
            key = torch.cat([key, extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2)
            value = torch.cat([value, extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2)
        if self.fused_attn:
            x = softmax_attention(query, key, value, self.attn_drop.p if self.training else 0.0)
        else:  # the map passes through a module, where hooks can read it
            x = self.attn_drop(attention_weights(query, key)) @ value
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))
