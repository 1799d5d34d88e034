"""Cross-shaped window attention, CSWin Transformer (Dong et al., CVPR 2022), arXiv:2107.00652.

Half of the heads attend within vertical stripes of the map and half within horizontal ones; together, in one layer, a
token sees a cross. A depthwise convolution of the values inside each stripe is added (LePE).

Shapes: B batch, h heads, d channels a head, C = h * d; H x W tokens of the map in n stripes of L tokens; E extra keys.
"""

from typing import Any

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.window import merge_windows, partition_windows, window_attention, window_mask
from vizattn.errors import VizattnError

__all__ = ["CrossShapedAttention", "stripe_attention"]


def stripe_attention(
    qkv: Tensor,
    stripe: tuple[int, int],
    num_heads: int,
    lepe_weight: Tensor,
    lepe_bias: Tensor | None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention inside stripes of a map, with the convolution of the values inside each stripe added.

    A map that the stripes do not divide ends in a narrower one.
    Time is O(H W C) times the tokens of a stripe, memory O(H W C).

    Args:
        qkv: Queries, keys and values side by side, (3, B, H, W, C).
        stripe: Height and width of a stripe.
        num_heads: Heads h; must divide C.
        lepe_weight: Kernels of a depthwise convolution of an odd size k, (C, 1, k, k).
        lepe_bias: Its bias (C); None for none.
        extra_kv: Keys and values (B or 1, h, E, d) that every token may attend to besides.
        dropout_p: Share of attention weights set to zero.

    Returns:
        (B, H, W, C).
    """
    _, B, H, W, C = qkv.shape
    windows = partition_windows(qkv.flatten(0, 1), stripe)
    query, key, value = windows.unflatten(0, (3, -1)).unbind(0)  # (B * n, L, C) each
    n = query.shape[0] // B
    # Zeros around a stripe, as around the map: the convolution does not look into its neighbours.
    local = value.reshape(-1, stripe[0], stripe[1], C).permute(0, 3, 1, 2)
    local = F.conv2d(local, lepe_weight, lepe_bias, padding=lepe_weight.shape[-1] // 2, groups=C)
    local = local.flatten(2).transpose(1, 2)
    query, key, value = [x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
    if extra_kv is not None:
        more = [x.to(query.dtype).expand(B, -1, -1, -1).repeat_interleave(n, 0) for x in extra_kv]
        key, value = torch.cat([key, more[0]], dim=2), torch.cat([value, more[1]], dim=2)
    mask = window_mask((H, W), stripe, device=qkv.device)
    x = window_attention(query, key, value, mask=mask, dropout_p=dropout_p).transpose(1, 2).flatten(2) + local
    return merge_windows(x, (H, W), stripe)


@register_notrace_module  # stripes depend on the size of the map
class CrossShapedAttention(nn.Module):
    """Multi-head attention in stripes of the map: vertical ones for the first half of the heads, then horizontal ones.

    It works on maps alone: there are no prefix tokens.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`, and be even where there are two branches.
        split_size: Width of the stripes.
        num_branches: 2, or 1 for attention over the whole map, as in the last stage of a pyramid.
        qkv_bias: Whether the query, key and value projection has a bias.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Heads that do not divide the channels or branches, or a `split_size` that is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        split_size: int = 7,
        num_branches: int = 2,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        if num_branches not in (1, 2) or num_heads % num_branches:
            raise VizattnError(f"{num_heads} heads cannot be split into {num_branches} branches (1 or 2).")
        if split_size < 1:
            raise VizattnError(f"split_size of cross-shaped attention must be at least 1, not {split_size}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.split_size = split_size
        self.num_branches = num_branches

        width = dim // num_branches
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.lepes = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width, **dd) for _ in range(num_branches)
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, E, d) of normed tokens (B, E, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int],
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, H * W, C) -> the same; every token may attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        H, W = grid_size
        stripes = [(H, W)]
        if self.num_branches == 2:
            stripes = [(H, min(self.split_size, W)), (min(self.split_size, H), W)]
        heads = self.num_heads // self.num_branches
        width = C // self.num_branches
        qkv = self.qkv(x).reshape(B, H, W, 3, C).permute(3, 0, 1, 2, 4)
        outputs: list[Tensor] = []
        for i, lepe in enumerate(self.lepes):
            more: tuple[Tensor, Tensor] | None = None
            if extra_kv is not None:
                more = (extra_kv[0][:, i * heads : (i + 1) * heads], extra_kv[1][:, i * heads : (i + 1) * heads])
            part = qkv[..., i * width : (i + 1) * width]
            dropout_p = self.attn_drop.p if self.training else 0.0
            y = stripe_attention(part, stripes[i], heads, lepe.weight, lepe.bias, more, dropout_p)  # type: ignore[arg-type]
            outputs.append(y.reshape(B, N, width))
        return self.proj_drop(self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)))
