"""Bi-level routing attention, arXiv:2303.08810: regions choose regions, then tokens attend to what these contain.

The map is cut into regions. Each has one descriptor for queries and one for keys, the means over its tokens; it is
routed to the `topk` regions whose key descriptors have the largest product with its query descriptor. The choice itself
has no gradient. A map that the regions do not divide ends in smaller regions, at the bottom and right.

Shapes: B batch, h heads, d channels a head, C = h * d; H x W patch tokens in R regions of L tokens; P prefix tokens,
N = P + H * W; E extra keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vizattn.attention.bilevel_native import attend_regions
from vizattn.attention.native import LANES, usable
from vizattn.errors import VizattnError
from vizattn.layers import Linear
from vizattn.layers.eager import eager

__all__ = ["BilevelRoutingAttention", "bilevel_routing_attention", "route"]


def route(query: Tensor, key: Tensor, grid_size: tuple[int, int], region_size: tuple[int, int], topk: int) -> Tensor:
    """The regions that each region is routed to.

    Args:
        query: (B, h, H * W, d), row by row.
        key: (B, h, H * W, d).
        grid_size: (H, W).
        region_size: Height and width of a region, in tokens.
        topk: How many; at most R.

    Returns:
        (B, R, topk), indices of regions, row by row.
    """
    regions = (
        _split_regions(query.detach(), grid_size, region_size),
        _split_regions(key.detach(), grid_size, region_size),
    )
    return _choose(regions[0], regions[1], _tokens(query, grid_size, region_size), topk)


def _choose(query: Tensor, key: Tensor, tokens: Tensor | None, topk: int) -> Tensor:
    """(B, R, L, C) twice, and (R, L), which of them are tokens, not padding, which is zero -> (B, R, topk)."""
    if tokens is None:
        query, key = query.mean(dim=2), key.mean(dim=2)
    else:
        count = tokens.sum(dim=1, keepdim=True)
        query, key = query.sum(dim=2) / count, key.sum(dim=2) / count
    return (query @ key.transpose(1, 2)).topk(topk, dim=-1)[1]


def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_size: tuple[int, int],
    region_size: tuple[int, int],
    topk: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    max_masked: int = 1600,
    max_copied: int = 4_000_000,
) -> Tensor:
    """softmax(scale * query key^T) value over the tokens of the routed regions and all tokens before the map.

    The last H * W queries, keys and values are those of the map, row by row. Keys and values before them may be
    attended to by every query; the queries before the map attend to every key.

    What is computed, by shape: attention over all tokens if every region is routed to all; tiles of the compiled
    library, where it is and is worth it, which copy nothing; attention over all tokens with a mask if a region is
    routed to 30 % of them or more (20 % for regions of 8 tokens or fewer: where it began to pay on a CPU) and the
    map is small; else keys and values of the routed regions are copied together, for as many query regions at a time as
    keeps the copies bounded. Where that takes several portions, the copies are made again in the backward pass rather
    than kept.

    Time is O(N C k) for N tokens and k = topk * L keys, and O(R^2 C) to choose; so with as many regions for any map it
    grows with N^2. Memory is O(N C) by tiles, O(N C topk) up to `max_copied`, or O(N^2) behind a mask.

    Args:
        query: (B, h, P + H * W, d).
        key: (B, h, E + P + H * W, d).
        value: (B, h, E + P + H * W, e).
        grid_size: (H, W).
        region_size: Height and width of a region, in tokens.
        topk: Regions that each region is routed to; all, if there are fewer.
        scale: Factor of the products; d^-0.5 if None.
        dropout_p: Share of attention weights set to zero.
        max_masked: Most tokens H * W for a mask, which has (H * W)^2 entries a sample.
        max_copied: Most numbers a sample in the copies of keys, and as many for values (but at least one region's).

    Returns:
        (B, h, P + H * W, e).
    """
    B, h, _, e = value.shape
    H, W = grid_size
    rows, columns = region_size
    R_h, R_w = -(-H // rows), -(-W // columns)
    R, L = R_h * R_w, rows * columns
    if topk >= R:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)

    P, G = query.shape[2] - H * W, key.shape[2] - H * W
    q, k, v = query[:, :, P:], key[:, :, G:], value[:, :, G:]
    if not torch.jit.is_scripting() and _native_is_best(query, key, value, L, topk, R, dropout_p):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        routed = route(q, k, grid_size, region_size, topk)
        y = attend_regions(q, key, value, routed, grid_size, region_size, scale)
        return y if P == 0 else _with_prefix(query[:, :, :P], key, value, y, scale, dropout_p)
    q, k = _split_regions(q, grid_size, region_size), _split_regions(k, grid_size, region_size)
    tokens = _tokens(query, grid_size, region_size)
    routed = _choose(q.detach(), k.detach(), tokens, topk)

    # On the meta device multiply-adds are counted: those of the definition, not the mask's few in a hundred more.
    counted = query.device.type == "meta"
    if topk >= R * (0.2 if L <= 8 else 0.3) and max_masked >= H * W and not counted:
        region_row = torch.arange(H, device=query.device) // rows
        region_column = torch.arange(W, device=query.device) // columns
        region = (region_row[:, None] * R_w + region_column).flatten()
        bias = query.new_full((B, R, R), float("-inf")).scatter(2, routed, 0.0)
        bias = F.pad(bias.index_select(2, region).index_select(1, region), (G, 0, P, 0))[:, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)

    v = _split_regions(v, grid_size, region_size)
    before = (key[:, :, :G], value[:, :, :G])

    step = max(1, max_copied // (topk * L * max(k.shape[-1], h * e)))
    outputs = []
    for start in range(0, R, step):
        arguments = (
            q[:, start : start + step],
            k,
            v,
            routed[:, start : start + step],
            tokens,
            before,
            scale,
            dropout_p,
        )
        if torch.jit.is_scripting():
            outputs.append(_attend_routed(*arguments))
        elif step < R and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            outputs.append(checkpoint(_attend_routed, *arguments, use_reentrant=False))
        else:
            outputs.append(_attend_routed(*arguments))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    y = y.view(B, R_h, R_w, rows, columns, h * e).transpose(2, 3).reshape(B, R_h * rows, R_w * columns, h * e)
    y = y[:, :H, :W].reshape(B, H * W, h, e).transpose(1, 2)
    return y if P == 0 else _with_prefix(query[:, :, :P], key, value, y, scale, dropout_p)


def _with_prefix(
    query: Tensor, key: Tensor, value: Tensor, patches: Tensor, scale: float | None, dropout_p: float
) -> Tensor:
    """Outputs of queries before the map, which attend to every key, and those of the patches."""
    prefix = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    return torch.cat([prefix, patches], dim=2)


@torch.jit.unused
def _native_is_best(query: Tensor, key: Tensor, value: Tensor, L: int, topk: int, R: int, dropout_p: float) -> bool:
    """Whether the compiled library can do it, and would be faster: not where small regions leave its lanes empty."""
    fewer = 3 * (L + -L % LANES) * topk <= 4 * L * R  # scores, about, than of all tokens by all
    alike = key.shape == value.shape and (*query.shape[:2], query.shape[3]) == (*key.shape[:2], key.shape[3])
    plain = dropout_p == 0 and not torch.is_autocast_enabled("cpu")
    return fewer and alike and plain and usable(query, key, value) and eager(query, key, value)


def _split_regions(x: Tensor, grid_size: tuple[int, int], region_size: tuple[int, int]) -> Tensor:
    """(B, h, H * W, d) -> (B, R, L, h * d), filled up with zeros."""
    H, W = grid_size
    rows, columns = region_size
    R_h, R_w = -(-H // rows), -(-W // columns)
    x = x.unflatten(2, (H, W))
    if R_h * rows > H or R_w * columns > W:
        x = F.pad(x, (0, 0, 0, R_w * columns - W, 0, R_h * rows - H))
    x = x.unflatten(3, (R_w, columns)).unflatten(2, (R_h, rows)).permute(0, 2, 4, 3, 5, 1, 6)
    return x.reshape(x.shape[0], R_h * R_w, rows * columns, -1)


def _tokens(x: Tensor, grid_size: tuple[int, int], region_size: tuple[int, int]) -> Tensor | None:
    """(R, L), whether each place of a region is a token, not padding; None if all are."""
    if grid_size[0] % region_size[0] == 0 and grid_size[1] % region_size[1] == 0:
        return None
    inside = x.new_ones(1, 1, grid_size[0] * grid_size[1], 1, dtype=torch.bool)
    return _split_regions(inside, grid_size, region_size)[0, :, :, 0]


def _attend_routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routed: Tensor,
    mask: Tensor | None,
    before: tuple[Tensor, Tensor],
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Attention of r query regions to their routed regions.

    Args:
        query: (B, r, L, C).
        key: (B, R, L, C).
        value: (B, R, L, h * e).
        routed: (B, r, topk).
        mask: (R, L), False in the padding; None if there is none.
        before: Keys and values before the map, (B, h, G, d) and (B, h, G, e).
        scale: Factor of the products.
        dropout_p: Share of attention weights set to zero.

    Returns:
        (B, r, L, h * e).
    """
    B, r, L, _ = query.shape
    h, G = before[0].shape[1], before[0].shape[2]
    rows = (routed + key.shape[1] * torch.arange(B, device=routed.device)[:, None, None]).flatten()
    parts = []
    for regions, first in ((key, before[0]), (value, before[1])):
        part = regions.flatten(0, 1).index_select(0, rows).reshape(B * r, -1, h, first.shape[3]).transpose(1, 2)
        if G > 0:
            first = first[:, None].expand(-1, r, -1, -1, -1).reshape(B * r, h, G, -1)
            part = torch.cat([first, part], dim=2)
        parts.append(part)
    if mask is not None:
        mask = F.pad(mask.index_select(0, routed.flatten()).reshape(B * r, 1, 1, -1), (G, 0), value=1.0)
    query = query.reshape(B * r, L, h, -1).transpose(1, 2)
    y = F.scaled_dot_product_attention(query, parts[0], parts[1], attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return y.transpose(1, 2).reshape(B, r, L, -1)


@register_notrace_module  # paths depend on shapes
class BilevelRoutingAttention(nn.Module):
    """Multi-head bi-level routing attention, with a depthwise convolution of the values added (LePE, arXiv:2107.00652).

    Prefix tokens and extra keys are in no region: every token attends to them, and prefix tokens attend to everything.
    The convolution reaches the patch tokens only. Products are scaled by C^-0.5, as published, and not by d^-0.5.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`. All heads share the routes.
        grid_size: Not used: no parameter depends on it.
        num_prefix_tokens: Not used either.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries and keys are normalised a head, arXiv:2302.05442.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        norm_layer: The normalisation for `qk_norm`, called with the channels a head.
        topk: Regions that each region is routed to.
        n_win: Regions along each side of the map, whatever its size, so regions grow with the map. A map too small or
            not divided by it has fewer.
        region_size: Tokens along each side of a region, instead of `n_win`: their number grows with the map.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, or `topk`, `n_win` or `region_size` is not positive.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        topk: int = 4,
        n_win: int = 7,
        region_size: int | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        for name, option in (("topk", topk), ("n_win", n_win), ("region_size", region_size)):
            if option is not None and option < 1:
                raise VizattnError(f"{name} of bilevel_routing must be at least 1, not {option}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = dim**-0.5
        self.topk = topk
        self.n_win = n_win
        self.region_size = region_size

        self.qkv = Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)
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
        grid_size: tuple[int, int],
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, P + H * W, C) -> the same; every token may attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        H, W = grid_size
        region_size = (-(-H // self.n_win), -(-W // self.n_win))
        if self.region_size is not None:
            region_size = (self.region_size, self.region_size)
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        local = value.transpose(1, 2).reshape(B, N, C)[:, N - H * W :].reshape(B, H, W, C).permute(0, 3, 1, 2)
        local = self.lepe(local).permute(0, 2, 3, 1).reshape(B, H * W, C)
        query, key = self.q_norm(query), self.k_norm(key)
        if extra_kv is not None:
            key = torch.cat([extra_kv[0].to(key.dtype).expand(B, -1, -1, -1), key], dim=2)
            value = torch.cat([extra_kv[1].to(value.dtype).expand(B, -1, -1, -1), value], dim=2)
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = bilevel_routing_attention(
            query, key, value, (H, W), region_size, self.topk, scale=self.scale, dropout_p=dropout_p
        )
        if N > H * W:  # no convolution for the prefix tokens
            local = F.pad(local, (0, 0, N - H * W, 0))
        x = x.transpose(1, 2).reshape(B, N, C) + local
        return self.proj_drop(self.proj(x))
