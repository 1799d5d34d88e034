"""How the maps of the mechanisms of this package are read, see `maps`.

Local mechanisms are products of what happens along the two axes: which keys a query sees, and which row of a table of
biases belongs to their offset.

Shapes: B batch, h heads, d channels a head, n queries, H x W grid, L length of an axis, P prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.agent import AgentAttention, agent_weights
from vizattn.attention.bilevel_routing import BilevelRoutingAttention, route
from vizattn.attention.cascaded_group import CascadedGroupAttention
from vizattn.attention.cross_shaped import CrossShapedAttention
from vizattn.attention.halo import HaloAttention, HaloAttention2d
from vizattn.attention.linear import LinearAttention
from vizattn.attention.maps import AttentionCall, AttentionMap, map_of, softmax_map
from vizattn.attention.neighborhood import NeighborhoodAttention, fitting_axis
from vizattn.attention.neighborhood_tiles import Axis, start_end
from vizattn.attention.softmax import SoftmaxAttention
from vizattn.attention.window import WindowAttention

__all__ = ["Seen", "along_window", "local_bias"]


class Seen(NamedTuple):
    """What n queries see along one axis."""

    sees: Tensor
    """(n, L), whether a key is seen."""
    offset: Tensor
    """(n, L), the entry of a key in the table of biases; anything where it is not seen."""


def local_bias(y: Seen, x: Seen, table: Tensor | None = None) -> Tensor:
    """Zero or the bias where both axes are seen, minus infinity elsewhere: (1, 1 or h, n, H * W).

    Args:
        y: Along the height.
        x: Along the width.
        table: (h, entries of y, entries of x).
    """
    sees = (y.sees[:, :, None] & x.sees[:, None, :]).flatten(1)
    if table is None:
        return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, -math.inf)[None, None]
    rows, columns = (s.offset.clamp(0, size - 1) for s, size in zip((y, x), table.shape[1:]))
    bias = table[:, rows[:, :, None], columns[:, None, :]].flatten(2)
    return bias.masked_fill(~sees, -math.inf)[None]


def along_window(queries: Tensor, length: int, size: int, shift: int = 0, entry_0: int = 0) -> Seen:
    """Windows of `size` along an axis, filled up at its end, then rolled back by `shift`; what is rolled over the
    border does not meet the rest. Offsets are query - key + `entry_0`."""
    position = torch.arange(length, device=queries.device)
    rolled = (position - shift) % (length + -length % size)
    window = 2 * (rolled // size) + (position < shift).long()
    sees = window[queries].unsqueeze(1) == window
    return Seen(sees, rolled[queries].unsqueeze(1) - rolled + entry_0)


def _qkv(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed tokens (B, N, C) to queries, keys and values (B, h, N, d)."""
    query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[operator, arg-type]
    return attn.q_norm(query), attn.k_norm(key), value  # type: ignore[operator]


def _prefix(call: AttentionCall) -> int:
    return call.x.shape[1] - call.grid_size[0] * call.grid_size[1]


@map_of.register
def _(attn: SoftmaxAttention, call: AttentionCall) -> AttentionMap:
    return softmax_map("softmax", *_qkv(attn, call.x), call.grid_size, prefix=_prefix(call), extra_kv=call.extra_kv)


@map_of.register
def _(attn: WindowAttention, call: AttentionCall) -> AttentionMap:
    H, W = call.grid_size
    window = (min(attn.window_size[0], H), min(attn.window_size[1], W))
    shift = [size // 2 if attn.shift and size < length else 0 for size, length in zip(window, (H, W))]
    native = attn.window_size
    table: Tensor | None = attn.relative_position_bias_table
    if table is not None:
        table = table.view(2 * native[0] - 1, 2 * native[1] - 1, -1).permute(2, 0, 1)

    def bias(queries: Tensor) -> Tensor:
        y = along_window(queries // W, H, window[0], shift[0], native[0] - 1)
        return local_bias(y, along_window(queries % W, W, window[1], shift[1], native[1] - 1), table)

    return softmax_map(
        "window", *_qkv(attn, call.x), (H, W), prefix=_prefix(call), patch_bias=bias, extra_kv=call.extra_kv
    )


@map_of.register
def _(attn: CrossShapedAttention, call: AttentionCall) -> AttentionMap:
    H, W = call.grid_size
    query, key, value = attn.qkv(call.x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    stripes = [(H, W)]
    if attn.num_branches == 2:
        stripes = [(H, min(attn.split_size, W)), (min(attn.split_size, H), W)]

    def bias(queries: Tensor) -> Tensor:
        branches = [
            local_bias(along_window(queries // W, H, height), along_window(queries % W, W, width))
            for height, width in stripes
        ]
        return torch.cat(branches, dim=1).repeat_interleave(attn.num_heads // len(branches), dim=1)

    return softmax_map("stripes", query, key, value, (H, W), patch_bias=bias, extra_kv=call.extra_kv)


@map_of.register
def _(attn: NeighborhoodAttention, call: AttentionCall) -> AttentionMap:
    H, W = call.grid_size
    axes = [fitting_axis(length, *option) for length, option in zip((H, W), attn.options)]

    def bias(queries: Tensor) -> Tensor:
        return local_bias(
            _along_neighborhood(queries // W, axes[0]), _along_neighborhood(queries % W, axes[1]), attn.rpb
        )

    return softmax_map(
        "neighborhood", *_qkv(attn, call.x), (H, W), prefix=_prefix(call), patch_bias=bias, extra_kv=call.extra_kv
    )


def _along_neighborhood(queries: Tensor, axis: Axis) -> Seen:
    position = torch.arange(axis.length, device=queries.device)
    group, j = (queries % axis.dilation).unsqueeze(1), (queries // axis.dilation).unsqueeze(1)
    start, end = start_end(axis, j, (axis.length - 1 - group) // axis.dilation + 1)
    t = position // axis.dilation
    return Seen((position % axis.dilation == group) & (t >= start) & (t < end), t - j + axis.reach)


@map_of.register
def _(attn: BilevelRoutingAttention, call: AttentionCall) -> AttentionMap:
    H, W = call.grid_size
    P = _prefix(call)
    query, key, value = _qkv(attn, call.x)
    rows, columns = -(-H // attn.n_win), -(-W // attn.n_win)
    if attn.region_size is not None:
        rows = columns = attn.region_size
    R_w = -(-W // columns)
    R = -(-H // rows) * R_w
    position = torch.arange(H * W, device=call.x.device)
    region = position // W // rows * R_w + position % W // columns
    unseen = torch.zeros(1, R, R, device=call.x.device)
    if attn.topk < R:
        routed = route(query[:, :, P:], key[:, :, P:], (H, W), (rows, columns), attn.topk)
        unseen = torch.full((len(query), R, R), -math.inf, device=call.x.device).scatter(2, routed, 0.0)

    def bias(queries: Tensor) -> Tensor:
        return unseen[:, region[queries]][:, :, region].unsqueeze(1)

    return softmax_map(
        "routing",
        query,
        key,
        value,
        (H, W),
        prefix=P,
        scale=attn.scale,
        patch_bias=bias,
        extra_kv=call.extra_kv,
    )


@map_of.register
def _(attn: HaloAttention, call: AttentionCall) -> AttentionMap:
    query, key, value = _qkv(attn, call.x)
    return _halo_map(attn, query, key, value, call.grid_size, _prefix(call), 1, call.extra_kv)


@map_of.register
def _(attn: HaloAttention2d, call: AttentionCall) -> AttentionMap:
    x = call.x.permute(0, 2, 3, 1)
    key, value = (
        attn.kv(x).flatten(1, 2).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2).tensor_split([attn.head_dim], -1)
    )
    query = attn.q(x[:, :: attn.stride, :: attn.stride]).flatten(1, 2).unflatten(-1, (attn.num_heads, -1))
    grid = (x.shape[1], x.shape[2])
    return _halo_map(attn, query.transpose(1, 2), key, value, grid, 0, attn.stride, None, attn.mask_padding)


def _halo_map(
    attn: HaloAttention | HaloAttention2d,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    prefix: int,
    stride: int,
    extra_kv: tuple[Tensor, Tensor] | None,
    mask_padding: bool = True,
) -> AttentionMap:
    size, halo = attn.block_size, attn.halo_size
    query_grid = (-(-grid[0] // stride), -(-grid[1] // stride))
    positions = [torch.arange(length, device=key.device) for length in grid]
    order = None
    if not mask_padding:  # the zeros around the map are keys, too: they come last
        positions = [torch.arange(-halo, length + -length % size + halo, device=key.device) for length in grid]
        inside = [(p >= 0) & (p < length) for p, length in zip(positions, grid)]
        order = (inside[0][:, None] & inside[1]).flatten().long().argsort(descending=True, stable=True)
        outside = len(order) - grid[0] * grid[1]
        key, value = F.pad(key, (0, 0, 0, outside)), F.pad(value, (0, 0, 0, outside))

    def along(queries: Tensor, axis: int) -> Seen:
        pixel = (queries * stride).unsqueeze(1)
        in_window = positions[axis] - pixel // size * size + halo
        sees = (in_window >= 0) & (in_window < size + 2 * halo)
        return Seen(sees, positions[axis] - pixel + 3 * halo + size - 1)

    def bias(queries: Tensor) -> Tensor:
        parts = []
        q = query[:, :, prefix + queries].to(torch.promote_types(query.dtype, torch.float32))
        seen = (along(queries // query_grid[1], 0), along(queries % query_grid[1], 1))
        for axis, table in zip(seen, (attn.height_rel, attn.width_rel)):
            rows = axis.offset.clamp(0, len(table) - 1)
            parts.append((q @ table.t().to(q.dtype)).gather(-1, rows.expand(*q.shape[:2], -1, -1)))
        by_offset = (parts[0].unsqueeze(-1) + parts[1].unsqueeze(-2)).flatten(3) + local_bias(*seen)
        return by_offset if order is None else by_offset[..., order]

    return softmax_map(
        "halo",
        query,
        key,
        value,
        grid,
        prefix=prefix,
        bias=None if order is None else bias,
        patch_bias=bias if order is None else None,
        extra_kv=extra_kv,
        query_grid=query_grid,
    )


@map_of.register
def _(attn: AgentAttention, call: AttentionCall) -> AttentionMap:
    """The product of both softmaxes: of the queries over the agents, and of these over the keys."""
    (H, W), P, B = call.grid_size, _prefix(call), len(call.x)
    query, key, value = _qkv(attn, call.x)
    patches = query[:, :, P:].transpose(2, 3).unflatten(3, (H, W)).flatten(1, 2)
    agents = F.adaptive_avg_pool2d(patches, attn.pool_size).flatten(2).unflatten(1, (attn.num_heads, -1))
    E = 0
    if call.extra_kv is not None:
        E = call.extra_kv[0].shape[2]
        key = torch.cat([call.extra_kv[0].to(key.dtype).expand(B, -1, -1, -1), key], dim=2)
        value = torch.cat([call.extra_kv[1].to(value.dtype).expand(B, -1, -1, -1), value], dim=2)
    biases = attn._biases(H, W, P, E, query.dtype)
    over_keys, over_agents = agent_weights(query, key, agents.transpose(2, 3), *biases)
    over_keys, value = over_keys.roll(-E, dims=3), value.roll(-E, dims=2)

    def rows(queries: Tensor) -> Tensor:
        return over_agents[..., queries].transpose(2, 3) @ over_keys

    return AttentionMap("", "agent", (H, W), (H, W), P, P, value, rows)


@map_of.register
def _(attn: LinearAttention, call: AttentionCall) -> AttentionMap:
    """temperature * ReLU(query) . ReLU(key) / max(sum over the keys, min_sum)."""
    query, key, value = _qkv(attn, call.x)
    if call.extra_kv is not None:
        key = torch.cat([key, call.extra_kv[0].to(key.dtype).expand(len(key), -1, -1, -1)], dim=2)
        value = torch.cat([value, call.extra_kv[1].to(value.dtype).expand(len(value), -1, -1, -1)], dim=2)
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = F.relu(query.to(wide)), F.relu(key.to(wide))

    def rows(queries: Tensor) -> Tensor:
        weights = query[:, :, queries] @ key.transpose(2, 3)
        return weights * attn.temperature / weights.sum(-1, keepdim=True).clamp(min=attn.min_sum)

    P = _prefix(call)
    return AttentionMap("", "linear", call.grid_size, call.grid_size, P, P, value, rows)


@map_of.register
def _(attn: CascadedGroupAttention, call: AttentionCall) -> AttentionMap:
    """Each head's keys depend on what the head before gave, so the layer runs again, watched at its projections."""
    B, _, H, W = call.x.shape
    counts = (-(-H // attn.window_size), -(-W // attn.window_size))
    window = (-(-H // counts[0]), -(-W // counts[1]))
    seen = _outputs(attn, [*attn.qkvs, *attn.dws], call.x)

    def on_map(part: Tensor) -> Tensor:
        """(B * windows * L, c) -> (B, H * W, c)."""
        part = part.reshape(B, *counts, *window, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return part[:, :H, :W].flatten(1, 2)

    heads = attn.num_heads
    query = torch.stack([on_map(q.permute(0, 2, 3, 1)) for q in seen[heads:]], dim=1)
    kv = torch.stack([on_map(qkv[..., attn.key_dim :]) for qkv in seen[:heads]], dim=1)
    table = attn.attention_biases.view(heads, attn.window_size, attn.window_size)

    def bias(queries: Tensor) -> Tensor:
        y, x = along_window(queries // W, H, window[0]), along_window(queries % W, W, window[1])
        return local_bias(Seen(y.sees, y.offset.abs()), Seen(x.sees, x.offset.abs()), table)

    key, value = kv.split([attn.key_dim, attn.head_dim], dim=-1)
    return softmax_map("cascade", query, key, value, (H, W), patch_bias=bias)


def _outputs(attn: nn.Module, parts: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What parts of an attention give while it runs on `x`, in their order."""
    seen: dict[int, Tensor] = {}

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        seen[id(module)] = output

    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        attn(x)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[id(part)] for part in parts]
