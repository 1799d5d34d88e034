"""Attention by its definition, with plain tensor operations: what the fast formulations are measured against.

Shapes: B batch, h heads, H x W tokens, d channels a head; queries, keys and values are (B, h, H, W, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "agent_products",
    "explicit_attention",
    "gather_neighborhood",
    "gather_regions",
    "linear_products",
    "neighborhood_keys",
    "quadratic_linear",
]


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value over (..., N, d), with the map (..., N, N) kept."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ value


def neighborhood_keys(length: int, kernel: int, dilation: int) -> Tensor:
    """(length, kernel): the keys of each position of an axis, shifted inwards at its ends."""
    i = torch.arange(length)
    residue, place = i % dilation, i // dilation
    members = (length - residue + dilation - 1) // dilation
    start = torch.minimum((place - kernel // 2).clamp(min=0), members - kernel)
    return (start[:, None] + torch.arange(kernel)) * dilation + residue[:, None]


def gather_neighborhood(
    query: Tensor, key: Tensor, value: Tensor, kernel: int, dilation: int = 1, rpb: Tensor | None = None
) -> Tensor:
    """Neighborhood attention (2204.07143, 2209.15001): keys and values of each query copied together.

    `rpb` (h, 2 * kernel - 1, 2 * kernel - 1) are biases by offset. Returns (B, h, H, W, d).
    """
    B, h, H, W, d = query.shape
    rows, columns = neighborhood_keys(H, kernel, dilation), neighborhood_keys(W, kernel, dilation)
    places = (rows[:, None, :, None] * W + columns[None, :, None, :]).reshape(H * W, kernel**2)
    near_keys, near_values = key.flatten(2, 3)[:, :, places], value.flatten(2, 3)[:, :, places]  # (B, h, N, k * k, d)
    scores = (near_keys @ (query.flatten(2, 3) * d**-0.5).unsqueeze(-1)).squeeze(-1)
    if rpb is not None:
        dy = (rows - torch.arange(H)[:, None]) // dilation + kernel - 1
        dx = (columns - torch.arange(W)[:, None]) // dilation + kernel - 1
        scores = scores + rpb[:, dy[:, None, :, None], dx[None, :, None, :]].reshape(h, H * W, kernel**2)
    return (scores.softmax(dim=-1).unsqueeze(-2) @ near_values).reshape(B, h, H, W, d)


def gather_regions(query: Tensor, key: Tensor, value: Tensor, region: tuple[int, int], topk: int) -> Tensor:
    """Bi-level routing attention (2303.08810): keys and values of the chosen regions copied together.

    Regions must divide the map. Returns (B, h, H, W, d).
    """
    B, h, H, W, d = query.shape
    R_h, R_w = H // region[0], W // region[1]

    def split(x: Tensor) -> Tensor:  # (B, R, h, L, d)
        x = x.reshape(B, h, R_h, region[0], R_w, region[1], d)
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(B, R_h * R_w, h, -1, d)

    q, k, v = split(query), split(key), split(value)
    descriptors = [x.detach().mean(dim=3).flatten(2) for x in (q, k)]
    chosen = (descriptors[0] @ descriptors[1].transpose(1, 2)).topk(topk, dim=-1)[1]  # (B, R, topk)
    batch = torch.arange(B)[:, None, None]
    near_keys, near_values = (x[batch, chosen].transpose(2, 3).flatten(3, 4) for x in (k, v))
    out = explicit_attention(q, near_keys, near_values)
    out = out.reshape(B, R_h, R_w, h, region[0], region[1], d).permute(0, 3, 1, 4, 2, 5, 6)
    return out.reshape(B, h, H, W, d)


def quadratic_linear(query: Tensor, key: Tensor, value: Tensor, min_sum: float = 100.0) -> Tensor:
    """ReLU linear attention (2501.16182) over (B, h, N, d), with its weights (N, N) kept."""
    weights = query.relu() @ key.relu().transpose(-2, -1)
    return weights @ value / weights.sum(dim=-1, keepdim=True).clamp(min=min_sum)


def linear_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The matrix products of linear attention over (B, h, N, d), and nothing else."""
    return query @ (key.transpose(-2, -1) @ value)


def agent_products(query: Tensor, key: Tensor, value: Tensor, agents: Tensor) -> Tensor:
    """The matrix products of agent attention (2312.08874) over (B, h, N, d), and nothing else."""
    return (agents @ query.transpose(-2, -1)).transpose(-2, -1) @ (agents @ key.transpose(-2, -1) @ value)
