"""Attention mechanisms, one a file, chosen by name.

The protocol a backbone relies on, so that a new mechanism is one file and one row of `ATTENTION`:

* Built as ``Mechanism(dim, num_heads, grid_size=(H, W), num_prefix_tokens=P, qkv_bias=..., qk_norm=..., attn_drop=...,
  proj_drop=..., norm_layer=..., device=..., dtype=...)``; `grid_size` and `num_prefix_tokens` are those of the native
  input and serve only to size parameters, such as tables of position biases.
* Called as ``attention(x, grid_size)`` with `x` of shape (B, P + H * W, dim) and `grid_size` the (H, W) of this very
  input, returning the same shape. The patch tokens are the last H * W, row by row; all before them are prefix tokens,
  including any that an adapter inserted (in front of the model's own), so their number is read off the input:
  ``x.shape[1] - H * W``.
* Called as ``attention(x, grid_size, extra_kv)`` with keys and values (B or 1, heads, E, channels a head) that every
  token may attend to besides, as if E prefix tokens more were there whose outputs nobody reads. They have no position
  bias and are never masked. ``attention.project_kv(tokens)`` gives them, from normed tokens (B or 1, E, dim). A
  mechanism that cannot do this takes no `extra_kv` and has no `project_kv`.
* It has ``num_heads``, and the output projection as ``proj``.
"""

from __future__ import annotations

from torch import nn

from vizattn.attention.agent import AgentAttention, agent_attention, agent_weights
from vizattn.attention.bilevel_routing import BilevelRoutingAttention, bilevel_routing_attention
from vizattn.attention.cascaded_group import CascadedGroupAttention, biased_attention
from vizattn.attention.cross_shaped import CrossShapedAttention, stripe_attention
from vizattn.attention.halo import HaloAttention, HaloAttention2d, halo_attention
from vizattn.attention.linear import LinearAttention, LocalConcentration, linear_attention
from vizattn.attention.neighborhood import NeighborhoodAttention, na1d, na2d, na3d
from vizattn.attention.softmax import SoftmaxAttention, attention_weights, packed_softmax_attention, softmax_attention
from vizattn.attention.window import WindowAttention, window_attention
from vizattn.errors import unknown

__all__ = [
    "ATTENTION",
    "AgentAttention",
    "BilevelRoutingAttention",
    "CascadedGroupAttention",
    "CrossShapedAttention",
    "HaloAttention",
    "HaloAttention2d",
    "LinearAttention",
    "LocalConcentration",
    "NeighborhoodAttention",
    "SoftmaxAttention",
    "WindowAttention",
    "agent_attention",
    "agent_weights",
    "attention_class",
    "attention_weights",
    "biased_attention",
    "bilevel_routing_attention",
    "halo_attention",
    "linear_attention",
    "na1d",
    "na2d",
    "na3d",
    "packed_softmax_attention",
    "softmax_attention",
    "stripe_attention",
    "window_attention",
]

ATTENTION: dict[str, type[nn.Module]] = {
    "agent": AgentAttention,
    "bilevel_routing": BilevelRoutingAttention,
    "halo": HaloAttention,
    "linear": LinearAttention,
    "neighborhood": NeighborhoodAttention,
    "softmax": SoftmaxAttention,
    "window": WindowAttention,
}


def attention_class(name: str) -> type[nn.Module]:
    """The mechanism called `name`.

    Raises:
        VizattnError: There is no such mechanism.
    """
    if name not in ATTENTION:
        raise unknown("attention", name, ATTENTION)
    return ATTENTION[name]
