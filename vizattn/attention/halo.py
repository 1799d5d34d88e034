"""Blocked local attention with halos, arXiv:2103.12731: a block of queries shares the keys of its neighborhood.

The map is cut into blocks of b x b queries; each block attends to the w x w keys, w = b + 2 * halo, around and in it.
Shapes: B batch, h heads, H x W map, d channels of a head, e channels of a head's values, n x m blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.halo_fused import attend_blocks
from vizattn.attention.halo_plain import attend_plain
from vizattn.attention.softmax import softmax_attention
from vizattn.errors import VizattnError
from vizattn.layers.eager import eager

__all__ = ["HaloAttention", "HaloAttention2d", "halo_attention"]


def _axis_windows(blocks: int, block_size: int, halo_size: int, device: torch.device) -> Tensor:
    """(n, w): the positions of each block's neighborhood on an axis that begins with the first block."""
    first = torch.arange(blocks, device=device) * block_size - halo_size
    return first.unsqueeze(1) + torch.arange(block_size + 2 * halo_size, device=device)


def _filled(x: Tensor, block_size: int, halo_size: int) -> Tensor:
    """(B, h, H, W, d) -> the same with a halo of zeros around a map of whole blocks."""
    H, W = x.shape[2], x.shape[3]
    bottom, right = -(-H // block_size) * block_size - H, -(-W // block_size) * block_size - W
    return F.pad(x, [0, 0, halo_size, right + halo_size, halo_size, bottom + halo_size])


def _relative_logits(query: Tensor, table: Tensor, window: int, stride: int) -> Tensor:
    """(..., q, d) with q query positions of a block along an axis -> (..., q, w): products with the table's rows."""
    positions = torch.arange(query.shape[-2], device=query.device) * stride
    keys = torch.arange(window, device=query.device)
    offsets = keys - positions.unsqueeze(1) + window - 1  # rows of the table
    # As one product of matrices: left to itself, torch copies a frozen table for every row of every block.
    logits = query.reshape(-1, query.shape[-1]) @ table.transpose(0, 1)
    logits = logits.view(list(query.shape[:-1]) + [-1])  # noqa: RUF005 (TorchScript)
    return logits.gather(-1, offsets.expand(list(logits.shape[:-1]) + [window]))  # noqa: RUF005 (TorchScript)


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    mask_padding: bool = True,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(query key^T / sqrt(d) + query (height_rel + width_rel)^T) value, each block over its neighborhood.

    Time is O(H W C w^2 / stride^2) with w = block_size + 2 * halo_size. On a CPU a row of blocks is worked on at a
    time, so that memory beyond the tokens' is that of one row; elsewhere all H W w^2 / stride^2 logits a head are kept.

    Args:
        query: (B, h, ceil(H / stride), ceil(W / stride), d): of every stride-th row and column, from the first.
        key: (B, h, H, W, d).
        value: (B, h, H, W, e).
        height_rel: (2 * w - 1, d): row r is for keys that lie r - (w - 1) - halo_size below the query. The first
            2 * halo_size rows are out of reach; published layers have them.
        width_rel: (2 * w - 1, d): the same for horizontal offsets.
        block_size: Height and width b of a block, in pixels of the keys' map; `stride` must divide it.
        halo_size: How far a block sees beyond its border.
        stride: Distance of the queries.
        mask_padding: Whether keys outside the map get no weight; else they are zeros that take part in the softmax.
        extra_kv: Keys (B or 1, h, E, d) and values (B or 1, h, E, e) that every query attends to besides.
        dropout_p: Share of attention weights set to zero.

    Returns:
        (B, h, ceil(H / stride), ceil(W / stride), e).
    """
    B, h, H, W, d = key.shape
    window, q = block_size + 2 * halo_size, block_size // stride
    n, m = (H + block_size - 1) // block_size, (W + block_size - 1) // block_size
    rows, columns = query.shape[2], query.shape[3]
    query = F.pad(query, [0, 0, 0, m * q - columns, 0, n * q - rows])
    query = query.reshape(B, h, n, q, m, q, d).transpose(3, 4)  # (B, h, n, m, q, q, d)

    vertical = _relative_logits(query.transpose(4, 5), height_rel, window, stride).transpose(4, 5)
    horizontal = _relative_logits(query, width_rel, window, stride)
    if mask_padding:
        y = _axis_windows(n, block_size, halo_size, query.device).view(n, 1, 1, 1, window)
        vertical = vertical.masked_fill((y < 0) | (y >= H), float("-inf"))
        x = _axis_windows(m, block_size, halo_size, query.device).view(m, 1, 1, window)
        horizontal = horizontal.masked_fill((x < 0) | (x >= W), float("-inf"))

    if extra_kv is None:
        extra_kv = (key.new_empty(B, h, 0, d), value.new_empty(B, h, 0, value.shape[-1]))
    blocks = (
        query.flatten(4, 5).flatten(0, 1).transpose(0, 1),
        torch.cat([vertical, horizontal], dim=-1).flatten(4, 5).flatten(0, 1).transpose(0, 1),
        _filled(key, block_size, halo_size).flatten(0, 1),
        _filled(value, block_size, halo_size).flatten(0, 1),
        extra_kv[0].to(key.dtype).expand(B, h, -1, -1).flatten(0, 1),
        extra_kv[1].to(value.dtype).expand(B, h, -1, -1).flatten(0, 1),
        block_size,
    )
    if torch.jit.is_scripting() or dropout_p > 0 or not _by_rows(blocks):
        x = attend_plain(*blocks, dropout_p)
    else:
        x = attend_blocks(*blocks)
    x = x.transpose(0, 1).reshape(B, h, n, m, q, q, -1).transpose(3, 4).reshape(B, h, n * q, m * q, -1)
    return x[:, :, :rows, :columns]


@torch.jit.unused
def _by_rows(blocks: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]) -> bool:
    """Whether to compute a row of blocks at a time, which is for a CPU's caches."""
    return blocks[2].device.type == "cpu" and blocks[2].dtype != torch.float16 and eager(*blocks[:-1])


def _checked(block_size: int, halo_size: int, stride: int) -> int:
    """The number of rows of a table of relative positions, 2 * w - 1."""
    if block_size < 1 or halo_size < 0:
        raise VizattnError(f"block_size must be 1 or more and halo_size 0 or more, not {block_size} and {halo_size}.")
    if block_size % stride:
        raise VizattnError(f"stride {stride} must divide block_size {block_size}.")
    return 2 * (block_size + 2 * halo_size) - 1


@register_notrace_module  # padding depends on the size of the map
class HaloAttention(nn.Module):
    """Halo attention on tokens.

    Patch tokens attend to the neighborhood of their block and to all prefix tokens, which have no position; prefix
    tokens attend to everything.

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
        block_size: Height and width of a block of queries.
        halo_size: How far a block sees beyond its border.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, or an impossible block or halo.
    """

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
        block_size: int = 8,
        halo_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        positions = _checked(block_size, halo_size, 1)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.block_size = block_size
        self.halo_size = halo_size

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.height_rel = nn.Parameter(torch.empty(positions, self.head_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(positions, self.head_dim, **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the position tables anew."""
        for table in (self.height_rel, self.width_rel):
            nn.init.normal_(table, std=self.head_dim**-0.5)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value

    def forward(self, x: Tensor, grid_size: tuple[int, int], extra_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, P + H * W, C) -> (B, P + H * W, C); every token may attend to `extra_kv`, (B or 1, h, E, d) each."""
        B, N, C = x.shape
        H, W = grid_size
        P = N - H * W
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        others = extra_kv
        if P > 0:
            others = (key[:, :, :P], value[:, :, :P])
            if extra_kv is not None:
                others = (
                    torch.cat([others[0], extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2),
                    torch.cat([others[1], extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2),
                )
        patches = halo_attention(
            query[:, :, P:].unflatten(2, (H, W)),
            key[:, :, P:].unflatten(2, (H, W)),
            value[:, :, P:].unflatten(2, (H, W)),
            self.height_rel,
            self.width_rel,
            self.block_size,
            self.halo_size,
            extra_kv=others,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        x = patches.permute(0, 2, 3, 1, 4).reshape(B, H * W, C)
        if P > 0:
            if extra_kv is not None:
                key = torch.cat([key, extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2)
                value = torch.cat([value, extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2)
            dropout_p = self.attn_drop.p if self.training else 0.0
            prefix = softmax_attention(query[:, :, :P], key, value, dropout_p)
            x = torch.cat([prefix.transpose(1, 2).reshape(B, P, C), x], dim=1)
        return self.proj_drop(self.proj(x))


@register_notrace_module  # padding depends on the size of the map
class HaloAttention2d(nn.Module):
    """Halo attention on a map, without an output projection; values may be wider than queries and keys.

    Args:
        dim: Channels C of the map, and of queries and keys.
        num_heads: Heads h; must divide `dim` and the channels of the values.
        block_size: Height and width of a block of queries, in pixels of the input.
        halo_size: How far a block sees beyond its border.
        value_ratio: Channels of the values, in units of C.
        stride: 2 for queries of every other row and column only: it halves the map.
        mask_padding: Whether keys outside the map get no weight; else they are zeros that take part in the softmax.
        attn_drop: Dropout rate of the attention weights.

    Raises:
        VizattnError: `num_heads` does not divide the channels, or an impossible block or halo.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        stride: int = 1,
        mask_padding: bool = True,
        attn_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = int(dim * value_ratio)
        if dim % num_heads or value_dim % num_heads:
            raise VizattnError(f"dim {dim} and values of {value_dim} cannot be split into {num_heads} heads.")
        positions = _checked(block_size, halo_size, stride)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.stride = stride
        self.mask_padding = mask_padding

        self.q = nn.Linear(dim, dim, bias=False, **dd)
        self.kv = nn.Linear(dim, dim + value_dim, bias=False, **dd)  # of each head: its keys, then its values
        self.height_rel = nn.Parameter(torch.empty(positions, self.head_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(positions, self.head_dim, **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        for table in (self.height_rel, self.width_rel):
            nn.init.normal_(table, std=self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, value_ratio * C, ceil(H / stride), ceil(W / stride)), channels last in memory."""
        x = x.permute(0, 2, 3, 1)
        kv = self.kv(x).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)
        query = self.q(x[:, :: self.stride, :: self.stride])
        x = halo_attention(
            query.unflatten(-1, (self.num_heads, self.head_dim)).permute(0, 3, 1, 2, 4),
            kv[..., : self.head_dim],
            kv[..., self.head_dim :],
            self.height_rel,
            self.width_rel,
            self.block_size,
            self.halo_size,
            self.stride,
            self.mask_padding,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return x.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)
