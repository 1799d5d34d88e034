"""Attention maps: who attends to whom, recomputed from what an attention was given, for the queries that are asked for.

No forward stores its weights; fused kernels never have them. `map_of` makes a map from a recorded call. Each mechanism
registers how: those here in `mechanism_maps`, others beside their class.

Shapes: B batch, h heads, Q queries, K keys, e channels of a head's values, H x W grid. Keys come in the order: prefix
tokens, the grid row by row, then all others (an adapter's prompts, padding that is attended to).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.errors import VizattnError

__all__ = ["AttentionCall", "AttentionMap", "map_of", "softmax_map"]

#: Weights computed at once where all are needed one after the other.
CHUNK = 1 << 23


@dataclass(frozen=True)
class AttentionCall:
    """What an attention was given in one forward."""

    x: Tensor
    """Its input: tokens (B, N, C), or a map (B, C, H, W)."""
    grid_size: tuple[int, int] = (0, 0)
    """Of the patches among the tokens."""
    extra_kv: tuple[Tensor, Tensor] | None = None
    """Keys and values (B or 1, h, E, d) of an adapter."""
    inserted: int = 0
    """Tokens of an adapter, in front."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments."""
    block: nn.Module | None = None
    """The module that the attention is a part of."""


@dataclass(frozen=True)
class AttentionMap:
    """The weights of one attention, computed when they are asked for. Without gradient."""

    name: str
    """Of the module, as in ``blocks.3.attn``."""
    kind: str
    """The mechanism: softmax, window, neighborhood, halo, routing, agent, linear, ..."""
    grid: tuple[int, int]
    """Height H and width W of the keys' grid."""
    query_grid: tuple[int, int]
    """That of the queries: smaller where the attention halves the map, (0, 0) for learnt queries."""
    prefix: int
    """Keys without a place, before the grid: class, register and inserted tokens."""
    query_prefix: int
    """Queries without a place, before the grid."""
    values: Tensor = field(repr=False)
    """What the weights mix, (B, h, K, e)."""
    rows: Callable[[Tensor], Tensor] = field(repr=False)
    """Indices of queries (n,) to their weights (B, h, n, K)."""

    @property
    def batch(self) -> int:
        """Images B."""
        return self.values.shape[0]

    @property
    def heads(self) -> int:
        """Heads h."""
        return self.values.shape[1]

    @property
    def keys(self) -> int:
        """Keys K: prefix, grid, and others."""
        return self.values.shape[2]

    @property
    def queries(self) -> int:
        """Queries Q: those without a place, then the grid."""
        return self.query_prefix + self.query_grid[0] * self.query_grid[1]

    @torch.no_grad()
    def weights(self, queries: Sequence[int] | Tensor | None = None) -> Tensor:
        """The weights of some queries (by default of all) over all keys, (B, h, n, K).

        Rows sum to one where the mechanism has a softmax; those of linear attention do not.

        Args:
            queries: Indices, counted as in `queries`.

        Raises:
            VizattnError: An index that does not exist.
        """
        if queries is None:
            index = torch.arange(self.queries, device=self.values.device)
        else:
            index = torch.as_tensor(queries, dtype=torch.long, device=self.values.device)
        if index.numel() and not (index.min() >= 0 and index.max() < self.queries):
            raise VizattnError(f"{self.name} has queries 0 to {self.queries - 1}, not {index.tolist()}.")
        return self.rows(index)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All queries in order, some at a time: their indices (n,) and weights (B, h, n, K)."""
        step = max(1, CHUNK // (self.batch * self.heads * self.keys))
        for index in torch.arange(self.queries, device=self.values.device).split(step):
            yield index, self.weights(index)

    def on_grid(self, weights: Tensor) -> Tensor:
        """Weights (..., K) of the keys that have a place: (..., H, W)."""
        area = self.grid[0] * self.grid[1]
        return weights[..., self.prefix : self.prefix + area].unflatten(-1, self.grid)

    def of_query(self, y: int, x: int) -> Tensor:
        """What the query in row `y` and column `x` of `query_grid` attends to, (B, h, H, W).

        Raises:
            VizattnError: There is no such query.
        """
        height, width = self.query_grid
        if not (0 <= y < height and 0 <= x < width):
            raise VizattnError(f"{self.name} has a grid of {height} x {width} queries; there is none at ({y}, {x}).")
        return self.on_grid(self.weights([self.query_prefix + y * width + x]))[:, :, 0]

    def of_token(self, index: int = -1) -> Tensor:
        """What a query without a place attends to, (B, h, H, W).

        Args:
            index: Among these `query_prefix` queries; negative counts from the end.

        Raises:
            VizattnError: There is no such query.
        """
        if not -self.query_prefix <= index < self.query_prefix:
            raise VizattnError(f"{self.name} has {self.query_prefix} queries without a place; there is no {index}.")
        return self.on_grid(self.weights([index % self.query_prefix]))[:, :, 0]

    def mean_received(self) -> Tensor:
        """The attention that each place receives, mean over all queries, (B, h, H, W)."""
        total = sum(weights.sum(2) for _, weights in self.chunks())
        return self.on_grid(torch.as_tensor(total) / self.queries)


@functools.singledispatch
def map_of(attn: nn.Module, call: AttentionCall) -> AttentionMap:
    """The map of one call of an attention in evaluation mode; its name is empty.

    Raises:
        VizattnError: Nobody has registered how attentions of this class are read.
    """
    raise VizattnError(f"No attention map is known of {type(attn).__name__}.")


def softmax_map(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    *,
    prefix: int = 0,
    scale: float | Tensor | None = None,
    bias: Callable[[Tensor], Tensor] | None = None,
    patch_bias: Callable[[Tensor], Tensor] | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    query_grid: tuple[int, int] | None = None,
) -> AttentionMap:
    """The map of softmax(scale * query key^T + bias).

    Args:
        kind: See `AttentionMap`.
        query: (B, h, Q, d).
        key: (B, h, K, d), without `extra_kv`.
        value: (B, h, K, e).
        grid: Of the keys.
        prefix: Tokens before the grid.
        scale: d^-0.5 if None.
        bias: From indices of queries (n,) to what is added to their scores, broadcastable to (B, h, n, K).
        patch_bias: The same of queries on the grid, counted from its first, over the grid: (B or 1, h or 1, n, H * W).
            Tokens that have no place have no bias.
        extra_kv: Keys (B or 1, h, E, d) and values (B or 1, h, E, e) that every query attends to besides.
        query_grid: Where it is not `grid`.
    """
    B, area = query.shape[0], grid[0] * grid[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    query = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    own = key.shape[2]
    if extra_kv is not None:
        key = torch.cat([key, extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2)
        value = torch.cat([value, extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2)
    key = key.to(wide).transpose(-2, -1)
    others = key.shape[3] - own

    def rows(queries: Tensor) -> Tensor:
        scores = query[:, :, queries] @ key
        if bias is not None:
            scores = scores + F.pad(bias(queries).to(wide), (0, others))
        if patch_bias is not None:
            placed = patch_bias((queries - prefix).clamp(min=0)).to(wide)
            placed = placed.masked_fill((queries < prefix).unsqueeze(1), 0.0)
            scores = scores + F.pad(placed, (prefix, key.shape[3] - prefix - area))
        return scores.softmax(dim=-1)

    return AttentionMap("", kind, grid, query_grid or grid, prefix, prefix, value, rows)
