"""Agent attention: a few agent tokens collect from all keys, and all queries read from the agents.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., ECCV 2024), arXiv:2312.08874.
The agents are the queries averaged over a coarse grid, so the cost grows linearly with the number of tokens.

Shapes: B batch, H x W patch tokens, P prefix tokens, N = P + H * W, E extra keys, M = E + N keys, h heads,
d channels a head, C = h * d, A agents.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from timm.layers import (
    register_notrace_module,  # type: ignore[attr-defined]
    trunc_normal_,
    use_fused_attn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.agent_native import attend_agents
from vizattn.attention.native import LANES, ready
from vizattn.errors import VizattnError
from vizattn.layers.eager import transformed

__all__ = ["AgentAttention", "agent_attention", "agent_weights", "resize_agent_tables"]


def agent_weights(
    query: Tensor,
    key: Tensor,
    agents: Tensor,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both attention maps: of agents over keys, and of queries over agents.

    The second map is held by agents, so that its softmax runs along the many queries.

    Args:
        query: (B, h, N, d).
        key: (B, h, M, d).
        agents: (B, h, A, d).
        key_bias: Added to the scores of agents and keys, (B or 1, h or 1, A, M).
        query_bias: Added to the scores of agents and queries, (B or 1, h or 1, A, N).

    Returns:
        softmax(agents key^T / sqrt(d) + key_bias) over the keys, (B, h, A, M), and
        softmax(agents query^T / sqrt(d) + query_bias) over the agents, (B, h, A, N).
    """
    agents = agents * query.shape[-1] ** -0.5
    key_scores, query_scores = agents @ key.transpose(-2, -1), agents @ query.transpose(-2, -1)
    if key_bias is not None:
        key_scores = key_scores + key_bias
    if query_bias is not None:
        query_scores = query_scores + query_bias
    return key_scores.softmax(dim=-1), query_scores.softmax(dim=-2)


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The agents collect values from the keys, and the queries from the agents; see `agent_weights`.

    The maps are made where dropout acts on them; and where a bias learns, which torch's fused kernels for the CPU do
    not take, if there is no compiled library.
    Time is O((N + M) A C); memory O((N + M) C), and (N + M) A weights a head more where the maps are made.

    Args:
        query: (B, h, N, d).
        key: (B, h, M, d).
        value: (B, h, M, e).
        agents: (B, h, A, d).
        key_bias: (B or 1, h or 1, A, M), above -2e38 for some key of each agent.
        query_bias: (B or 1, h or 1, A, N), above -2e38 for some agent of each query.
        dropout_p: Share of the weights of either map set to zero.

    Returns:
        (B, h, N, e).
    """
    if dropout_p == 0 and not torch.jit.is_scripting() and _by_library(query, key, value, agents, key_bias, query_bias):
        return attend_agents(query, key, value, agents, key_bias, query_bias, _by_maps)
    learning = torch.is_grad_enabled() and (
        (key_bias is not None and key_bias.requires_grad) or (query_bias is not None and query_bias.requires_grad)
    )
    if dropout_p == 0 and not learning and (torch.jit.is_scripting() or not transformed()):
        collected = F.scaled_dot_product_attention(agents, key, value, attn_mask=key_bias)
        query_bias = None if query_bias is None else query_bias.transpose(-2, -1).contiguous()
        return F.scaled_dot_product_attention(query, agents, collected, attn_mask=query_bias)
    return _by_maps(query, key, value, agents, key_bias, query_bias, dropout_p)


def _by_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    key_bias: Tensor | None,
    query_bias: Tensor | None,
    dropout_p: float = 0.0,
) -> Tensor:
    over_keys, over_agents = agent_weights(query, key, agents, key_bias, query_bias)
    if dropout_p > 0:
        over_keys, over_agents = F.dropout(over_keys, dropout_p), F.dropout(over_agents, dropout_p)
    return over_agents.transpose(-2, -1) @ (over_keys @ value)


@torch.jit.unused
def _by_library(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, key_bias: Tensor | None, query_bias: Tensor | None
) -> bool:
    if torch.is_autocast_enabled("cpu") or not ready(query, key, value, agents, key_bias, query_bias):
        return False
    of_keys, of_queries = (None if bias is None else bias.shape for bias in (key_bias, query_bias))
    return _fit(query.shape, key.shape, value.shape, agents.shape, of_keys, of_queries)


@functools.lru_cache(maxsize=256)
def _fit(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    agents: tuple[int, ...],
    key_bias: tuple[int, ...] | None,
    query_bias: tuple[int, ...] | None,
) -> bool:
    """Whether shapes are those of `agent_attention`, and the library's; only biases are broadcast, to images."""
    if not len(query) == len(key) == len(agents) == 4:
        return False
    (B, h, N, d), M, A = query, key[2], agents[2]
    tokens = key == value == (B, h, M, d) and agents == (B, h, A, d) and M > 0 and A > 0 and d > 0 and d % LANES == 0
    return tokens and key_bias in (None, (1, h, A, M)) and query_bias in (None, (1, h, A, N))


def _resize(table: Tensor, H: int, W: int) -> Tensor:
    """(h, A, H', W') -> (h, A, H, W)."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling() and table.shape[2:] == (H, W):
        return table  # graphs for maps of all sizes must not depend on whether it is
    return F.interpolate(table, size=(H, W), mode="bilinear", align_corners=False)


@register_notrace_module
class AgentAttention(nn.Module):
    """Multi-head agent attention with position biases, and a 3 x 3 depthwise convolution of the values added to it.

    Both softmaxes have a bias for each head, agent and position: a 7 x 7 table resized to the map, plus a row for each
    height and each width of the native map, resized at other sizes. Prefix tokens are keys of the agents and queries
    like all others; the native ones have biases of their own, further ones (those in front) have none. The convolution
    is of the patch tokens alone. Maps of any size; the agents of a map smaller than their grid repeat.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`.
        grid_size: Native map, the size of the tables by height and width.
        num_prefix_tokens: Native prefix tokens.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries (before the agents are taken from them) and keys are normalised a head.
        attn_drop: Dropout rate of the weights of both softmaxes.
        proj_drop: Dropout rate of the output.
        norm_layer: The normalisation for `qk_norm`, called with the channels a head.
        num_agents: Agents A, a square number.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, `num_agents` is not a square, or `grid_size` is missing.
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
        num_agents: int = 49,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        if num_agents < 1 or math.isqrt(num_agents) ** 2 != num_agents:
            raise VizattnError(f"num_agents must be a square number (1, 4, 9, ...), not {num_agents}.")
        if grid_size is None:
            raise VizattnError("Agent attention needs grid_size, the native map: its position biases have that size.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.pool_size = math.isqrt(num_agents)
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

        # First letter: what asks; second: what is asked. a agent, n patch, h height, w width, c class (prefix) token.
        H, W = grid_size
        self.an_bias = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7, **dd))
        self.na_bias = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, H, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, W, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, num_heads, H, 1, num_agents, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, num_heads, 1, W, num_agents, **dd))
        self.ac_bias = self.ca_bias = None
        if num_prefix_tokens:
            self.ac_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, num_prefix_tokens, **dd))
            self.ca_bias = nn.Parameter(torch.empty(1, num_heads, num_prefix_tokens, num_agents, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the position biases anew."""
        for parameter in self.parameters(recurse=False):
            trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As of any module; but tables of five dimensions are no maps, which `to(memory_format=...)` takes them for."""
        return super()._apply(lambda x: fn(x.flatten(1)).view(x.shape) if x.dim() == 5 else fn(x), recurse)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Make another map the native one: the tables by height and width are resized for good."""
        tables = {name: table.detach() for name, table in self.named_parameters(recurse=False)}
        resize_agent_tables(tables, grid_size)
        for name, table in tables.items():
            if table.shape != getattr(self, name).shape:
                setattr(self, name, nn.Parameter(table, requires_grad=getattr(self, name).requires_grad))

    def _biases(self, H: int, W: int, P: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The biases of keys (1, h, A, M) and queries (1, h, A, N)."""
        an = _resize(self.an_bias, H, W) + _resize(self.ah_bias[0], H, 1) + _resize(self.aw_bias[0], 1, W)
        ha, wa = self.ha_bias[0].permute(0, 3, 1, 2), self.wa_bias[0].permute(0, 3, 1, 2)
        na = _resize(self.na_bias, H, W) + _resize(ha, H, 1) + _resize(wa, 1, W)
        an, na = an.flatten(2)[None], na.flatten(2)[None]
        if self.ac_bias is not None and self.ca_bias is not None:
            an, na = torch.cat([self.ac_bias, an], dim=3), torch.cat([self.ca_bias.transpose(2, 3), na], dim=3)
        foreign = P - self.num_prefix_tokens  # prefix tokens of an adapter, in front (negative: native ones left out)
        if foreign + E != 0:
            an = F.pad(an, (foreign + E, 0))
        if foreign != 0:
            na = F.pad(na, (foreign, 0))
        return an.to(dtype), na.to(dtype)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int],
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C); the agents attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        H, W = grid_size
        P, E = N - H * W, 0
        qkv = self.qkv(x)
        query, key, value = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)

        # Maps (B, C, H, W) are views with channels last, of the tokens as they lie in memory.
        patches = query.transpose(1, 2)[:, P:].reshape(B, H, W, C).permute(0, 3, 1, 2)
        agents = F.adaptive_avg_pool2d(patches, self.pool_size).flatten(2).transpose(1, 2)
        agents = agents.reshape(B, -1, self.num_heads, self.head_dim).transpose(1, 2)
        local = self.dwc(qkv[:, P:, 2 * C :].unflatten(1, (H, W)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)

        if extra_kv is not None:
            E = extra_kv[0].shape[2]
            key = torch.cat([extra_kv[0].to(key.dtype).expand(B, -1, -1, -1), key], dim=2)
            value = torch.cat([extra_kv[1].to(value.dtype).expand(B, -1, -1, -1), value], dim=2)
        key_bias, query_bias = self._biases(H, W, P, E, query.dtype)
        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            x = agent_attention(query, key, value, agents, key_bias, query_bias, dropout_p)
        else:  # both maps pass through a module, where hooks can read them
            over_keys, over_agents = agent_weights(query, key, agents, key_bias, query_bias)
            x = self.attn_drop(over_agents).transpose(-2, -1) @ (self.attn_drop(over_keys) @ value)
        x = x.transpose(1, 2).reshape(B, N, C)
        x = x + (F.pad(local, (0, 0, P, 0)) if P > 0 else local)
        return self.proj_drop(self.proj(x))


def resize_agent_tables(state_dict: dict[str, Tensor], grid_size: tuple[int, int], prefix: str = "") -> None:
    """Resize the tables by height and width at `prefix` to another native map, in place.

    Args:
        state_dict: Any tensors; the tables among them are those named ah_bias, aw_bias, ha_bias and wa_bias.
        grid_size: The map (H, W).
        prefix: What comes before the names of the tables.
    """
    H, W = grid_size
    for name, size in (("ah_bias", (H, 1)), ("aw_bias", (1, W))):
        table = state_dict.get(prefix + name)
        if table is not None and table.shape[-2:] != size:
            state_dict[prefix + name] = _resize(table[0], *size)[None]
    for name, size in (("ha_bias", (H, 1)), ("wa_bias", (1, W))):
        table = state_dict.get(prefix + name)
        if table is not None and table.shape[2:4] != size:
            resized = _resize(table[0].permute(0, 3, 1, 2), *size)
            state_dict[prefix + name] = resized.permute(0, 2, 3, 1)[None].contiguous()
