"""Efficient probing, arXiv:2506.10178: learnt queries pool the tokens of a frozen backbone.

Shapes: B batch, N tokens, D their width, Q queries, E = D / d_out width of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy, core
from vizattn.adapters.base import attached, register
from vizattn.adapters.edits import Edits
from vizattn.adapters.head import classify, own_head
from vizattn.errors import VizattnError

__all__ = ["EfficientProbe", "EfficientProbing", "query_maps"]


@register("efficient_probing")
@dataclass(frozen=True)
class EfficientProbing:
    """Efficient probing: learnt queries pool the patch tokens of the frozen backbone, then a linear head."""

    num_queries: int = 32
    """Q; each query pools its own share of the output channels."""
    d_out: int = 1
    """The output has D / d_out channels."""
    include_cls: bool = False
    """Let the queries see the class token too: better on self-distilled backbones (DINO, DINOv2)."""

    needs_anatomy: ClassVar[bool] = True
    mergeable: ClassVar[str] = "its queries replace the pooling of the backbone"
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    composes_with: ClassVar[tuple[str, ...]] = ("vpt", "apla")
    cache_level: ClassVar[Literal["tokens"]] = "tokens"
    trains_backbone: ClassVar[bool] = False

    def attach(self, model: nn.Module, anatomy: Anatomy, edits: Edits) -> nn.Module:
        """Take the final norm out and put the probe in the place of pooling; a new head follows it.

        From then on `forward_features` returns the raw output of the last block, which is what the probe reads.

        Raises:
            VizattnError: D is no multiple of d_out * Q, or there is no class token to include.
        """
        if self.include_cls and not anatomy.has_class_token:
            raise VizattnError("efficient_probing: include_cls=True, but the backbone has no class token.")
        if self.num_queries < 1 or self.d_out < 1 or anatomy.embed_dim % (self.d_out * self.num_queries):
            divisors = [q for q in range(1, anatomy.embed_dim + 1) if anatomy.embed_dim % q == 0]
            near = min(divisors, key=lambda q: abs(q - self.num_queries))
            raise VizattnError(
                f"efficient_probing: the width {anatomy.embed_dim} must be a multiple of d_out * num_queries, "
                f"got {self.d_out} * {self.num_queries}. Closest that fits: 1 * {near}."
            )
        probe = ProbeHead(anatomy, self)
        if anatomy.final_norm is not None:
            edits.set(model, anatomy.final_norm, nn.Identity())
        own_head(model, probe.head_features, edits)
        return probe


class EfficientProbe(nn.Module):
    """Multi-query pooling of tokens (B, N, D) to (B, D / d_out).

    ``a_m = softmax(q_m X^T / sqrt(D))``, output = concatenation over m of ``a_m (X W_v)^(m)``. Pooling is linear, so
    the tokens are pooled before they are projected, which is the same sum in another order: B*N*D*Q + B*D*E products
    instead of B*N*D*E.
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.queries = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.v = nn.Linear(dim, dim // d_out, bias=False)

    def attention(self, tokens: Tensor) -> Tensor:
        """The maps a_m (B, Q, N); each sums to one over the tokens."""
        return ((tokens @ (self.queries * self.scale).t()).softmax(dim=1)).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D / d_out)."""
        pooled = self.attention(tokens).to(tokens.dtype) @ tokens  # B, Q, D
        weight = self.v.weight.unflatten(0, (self.queries.shape[0], -1))  # Q, E/Q, D
        return torch.bmm(pooled.transpose(0, 1), weight.transpose(1, 2).to(pooled.dtype)).transpose(0, 1).flatten(1)


class ProbeHead(nn.Module):
    """Tokens to pooled and normalised features; the classifier after it is the model's own."""

    def __init__(self, anatomy: Anatomy, options: EfficientProbing) -> None:
        super().__init__()
        self.channels_last, self.prefix = anatomy.channels_last, anatomy.num_prefix_tokens
        self.include_cls = options.include_cls
        self.head_features = anatomy.embed_dim // options.d_out
        self.probe = EfficientProbe(anatomy.embed_dim, options.num_queries, options.d_out)
        self.norm = nn.BatchNorm1d(self.head_features, affine=False, eps=1e-6)

    def tokens(self, features: Tensor) -> Tensor:
        """The tokens (B, N, D) that the queries see."""
        if features.ndim == 4:
            features = features if self.channels_last else features.permute(0, 2, 3, 1)
            return features.flatten(1, 2).contiguous()  # the same products whatever the layout in memory was
        patches = features[:, self.prefix :]
        return torch.cat([features[:, :1], patches], dim=1) if self.include_cls else patches

    def forward_head(self, model: Any, run: Callable[..., Tensor], x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of the last block to logits (B, C)."""
        x = self.norm(self.probe(self.tokens(x)))
        return x if pre_logits else classify(model, x)


def query_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Where each query looks: attention maps (B, Q, H, W) of the efficient probe on `model`.

    Args:
        model: A model with ``efficient_probing`` attached.
        images: (B, C, height, width).

    Raises:
        VizattnError: efficient probing is not attached.
    """
    probes: list[Any] = [a.module for a in attached(model) if a.method == "efficient_probing"]
    if not probes:
        raise VizattnError("query_maps needs a model with 'efficient_probing' attached.")
    inner: Any = core(model)
    features = inner.forward_features(images)
    maps = probes[0].probe.attention(probes[0].tokens(features))
    if features.ndim == 4:
        return maps.unflatten(2, features.shape[1:3] if probes[0].channels_last else features.shape[2:])
    grid = inner.patch_embed.dynamic_feat_size(images.shape[-2:])
    return maps[:, :, maps.shape[2] - grid[0] * grid[1] :].unflatten(2, grid)
