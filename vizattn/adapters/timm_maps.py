"""How the attention maps of timm's own classes and of the adapters are read, see `vizattn.attention.maps`.

Shapes: B batch, N tokens, P prefix tokens, h heads, d channels a head, n queries; H x W grid, w windows of L positions
each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from torch import Tensor, nn

from vizattn.adapters.anatomy import position_bias, project_qkv, rotate
from vizattn.adapters.efficient_probing import EfficientProbe
from vizattn.attention.maps import AttentionCall, AttentionMap, map_of, softmax_map
from vizattn.errors import VizattnError

__all__ = ["heads_enter"]


def heads_enter(attn: Any) -> nn.Module:
    """The module whose input is what the heads give, side by side, perhaps with a convolution added."""
    return attn.norm if isinstance(attn, Attention | AttentionRope | EvaAttention) else attn.proj


@map_of.register(Attention)
@map_of.register(AttentionRope)
@map_of.register(EvaAttention)
@map_of.register(BeitAttention)
def _(attn: Any, call: AttentionCall) -> AttentionMap:
    query, key, value = project_qkv(attn, call.x)
    options = call.options
    if options.get("is_causal"):
        raise VizattnError("Attention maps of causal attention are not known.")
    rope = options.get("rope")
    if rope is not None:
        prefix = int(attn.num_prefix_tokens) + call.inserted
        query, key = rotate(attn, query, rope, prefix), rotate(attn, key, rope, prefix)
    added = options.get("attn_mask")
    if added is None:
        added = position_bias(attn, options.get("shared_rel_pos_bias"), None, len(call.x))
    if added is not None and added.dtype == torch.bool:
        added = torch.zeros(added.shape, device=added.device).masked_fill(~added, -math.inf)
    if added is not None:
        added = F.pad(added, (call.inserted, 0, call.inserted, 0))
        added = added.view((1,) * (4 - added.ndim) + added.shape)

    def bias(queries: Tensor) -> Tensor:
        assert added is not None
        return added[:, :, queries] if added.shape[2] > 1 else added

    return softmax_map(
        "softmax",
        query,
        key,
        value,
        call.grid_size,
        prefix=call.x.shape[1] - math.prod(call.grid_size),
        scale=attn.scale,
        bias=None if added is None else bias,
        extra_kv=call.extra_kv,
    )


class _Windows(NamedTuple):
    """Where the tokens of a Swin block are: on the map, or in the padding, counted after it."""

    token: Tensor
    """(w, L), of each position of each window."""
    place: Tensor
    """(H * W), of each token: its position in the flattened windows."""
    padding: int


def _windows(grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], device: torch.device) -> _Windows:
    H, W = grid
    tokens = torch.arange(H * W, device=device).view(H, W).roll((-shift[0], -shift[1]), (0, 1))
    padded = F.pad(tokens, (0, -W % size[1], 0, -H % size[0]), value=-1)
    outside = padded.flatten() < 0
    padded = torch.where(outside, H * W - 1 + outside.cumsum(0), padded.flatten()).view(padded.shape)
    windows = (
        padded.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0])).transpose(1, 2).reshape(-1, math.prod(size))
    )
    return _Windows(windows, windows.flatten().argsort()[: H * W], int(outside.sum()))


@map_of.register(SwinAttention)
@map_of.register(SwinV2Attention)
def _(attn: Any, call: AttentionCall) -> AttentionMap:
    """Windows are padded after the shift, and the padding is attended to, as it is by the model."""
    block: Any = call.block
    size = tuple(attn.window_size)
    windows = _windows(call.grid_size, size, tuple(block.shift_size), call.x.device)  # type: ignore[arg-type]
    count, L = windows.token.shape
    area = math.prod(call.grid_size)
    query, key, value = (t.unflatten(0, (-1, count)).transpose(1, 2) for t in project_qkv(attn, call.x))
    if isinstance(attn, SwinV2Attention):
        query = F.normalize(query, dim=-1) * attn.logit_scale.clamp(max=math.log(100)).exp().unsqueeze(1)
        key = F.normalize(key, dim=-1)
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        bias = 16 * table[attn.relative_position_index].permute(2, 0, 1).sigmoid()
    else:
        query = query * attn.scale
        bias = attn._get_rel_pos_bias()[0]
    wide = torch.promote_types(key.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    mask = call.options.get("mask")
    extra_key = extra_value = value.new_empty(*value.shape[:2], 0, value.shape[-1])
    if call.extra_kv is not None:
        extra_key, extra_value = (t.to(value.dtype).expand(len(value), -1, -1, -1) for t in call.extra_kv)

    def rows(queries: Tensor) -> Tensor:
        window, position = windows.place[queries] // L, windows.place[queries] % L
        q = query[:, :, window, position]  # (B, h, n, d)
        scores = torch.einsum("bhnd,bhnld->bhnl", q, key[:, :, window]) + bias[:, position]
        if mask is not None:
            scores = scores + mask[window, position]
        weights = torch.cat([scores, q @ extra_key.to(wide).transpose(2, 3)], dim=3).softmax(-1)
        out = weights.new_zeros(*weights.shape[:3], area + windows.padding)
        index = windows.token[window].expand(*weights.shape[:2], -1, -1)
        # Padding comes last, after the prompts, as in `values`.
        out = out.scatter(3, index, weights[..., :L])
        return torch.cat([out[..., :area], weights[..., L:], out[..., area:]], dim=3)

    placed = value.flatten(2, 3)[:, :, windows.token.flatten().argsort()]
    values = torch.cat([placed[:, :, :area], extra_value, placed[:, :, area:]], dim=2)
    grid = call.grid_size
    return AttentionMap("", "window", grid, grid, 0, 0, values, rows)


@map_of.register
def _(attn: AttentionPoolLatent, call: AttentionCall) -> AttentionMap:
    """Learnt queries over all tokens, as in SigLIP."""
    x = call.x if attn.pos_embed is None else call.x + attn.pos_embed.to(call.x.dtype)
    query = attn.q(attn.latent.expand(len(x), -1, -1)).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    key, value = attn.kv(x).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return _pooling("pool", attn.q_norm(query), attn.k_norm(key), value, call, attn.scale)


@map_of.register
def _(attn: EfficientProbe, call: AttentionCall) -> AttentionMap:
    """One query a head, with the tokens as keys; each has its own share of the values."""
    query = attn.queries[:, None].expand(len(call.x), -1, -1, -1)
    key = call.x[:, None].expand(-1, query.shape[1], -1, -1)
    value = attn.v(call.x).unflatten(2, (query.shape[1], -1)).transpose(1, 2)
    return _pooling("probe", query, key, value, call, attn.scale)


def _pooling(kind: str, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, scale: float) -> AttentionMap:
    """The map of learnt queries (B, h, n, d) that have no place."""
    prefix = call.x.shape[1] - math.prod(call.grid_size)
    full = softmax_map(kind, query, key, value, call.grid_size, prefix=prefix, scale=scale)
    return AttentionMap("", kind, full.grid, (0, 0), prefix, query.shape[2], value, full.rows)
