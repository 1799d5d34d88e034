"""timm's layers in a model to which an adapter is attached: they do the same, in less time where gradients pass.

Without gradients they do as before, so that no bit changes by attaching or merging.
"""

from types import FunctionType
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from vizattn.adapters.edits import Edits
from vizattn.attention import packed_softmax_attention
from vizattn.layers.eager import watched
from vizattn.layers.mlp import FrozenMlp

__all__ = ["FrozenAttention", "lighten"]


def _named(function: Any, name: str) -> FunctionType:
    """The same function by another name, as scripts know a class's methods by that."""
    return FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)


class FrozenAttention(timm.layers.Attention):
    """timm's, with one gradient for queries, keys and values, and by the compiled library where it can be."""

    whole = _named(timm.layers.Attention.forward, "whole")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, dim_out)."""
        if not torch.jit.is_scripting() and attn_mask is None and not is_causal and self._usual(x):
            return self._packed(x)
        return self.whole(x, attn_mask, is_causal)

    @torch.jit.unused
    def _usual(self, x: Tensor) -> bool:
        if not (torch.is_grad_enabled() and x.requires_grad and self.fused_attn) or self.gate is not None:
            return False
        norms = self.q_norm, self.k_norm, self.norm
        return all(type(norm) is nn.Identity for norm in norms) and not watched(*norms, self.attn_drop)

    @torch.jit.unused
    def _packed(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        dropout_p = self.attn_drop.p if self.training else 0.0
        return self.proj_drop(self.proj(packed_softmax_attention(qkv, dropout_p).flatten(2)))


def lighten(model: nn.Module, edits: Edits) -> None:
    """Let timm's layers be these."""
    for module in model.modules():
        if type(module) is timm.layers.Mlp:
            edits.set(module, "__class__", FrozenMlp)
        elif type(module) is timm.layers.Attention:
            edits.set(module, "__class__", FrozenAttention)
