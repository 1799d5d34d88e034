"""Efficient probing, arXiv:2506.10178: learnt queries pool the tokens of a frozen backbone.

For dense prediction each position keeps its own share of what is pooled, so that the mean of the map over all positions
is the pooled output.

Shapes: B batch, N tokens, D their width, Q queries, E = D / d_out width of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.models._features import FeatureDictNet, FeatureInfo
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy, core
from vizattn.adapters.base import attached, register
from vizattn.adapters.edits import Edits
from vizattn.adapters.head import classify, normalise, own_head
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
    composes_with: ClassVar[tuple[str, ...]] = ("vpt", "apla")
    cache_level: ClassVar[Literal["tokens"]] = "tokens"
    trains_backbone: ClassVar[bool] = False

    def attach(self, model: nn.Module, anatomy: Anatomy, edits: Edits) -> nn.Module:
        """Take the final norm out and put the probe in the place of pooling; a new head follows it.

        From then on `forward_features` returns the raw output of the last block, which is what the probe reads. A
        `features_only` model gives one map of E channels, read from its last one.

        Raises:
            VizattnError: D is no multiple of d_out * Q, or there is no class token to include.
        """
        if self.include_cls and anatomy.features_only:
            raise VizattnError("efficient_probing: include_cls=True, but the class token has no place in a map.")
        if self.include_cls and not anatomy.has_class_token:
            raise VizattnError("efficient_probing: include_cls=True, but the backbone has no class token.")
        if self.num_queries < 1 or self.d_out < 1 or anatomy.embed_dim % (self.d_out * self.num_queries):
            divisors = [q for q in range(1, anatomy.embed_dim + 1) if anatomy.embed_dim % q == 0]
            near = min(divisors, key=lambda q: abs(q - self.num_queries))
            raise VizattnError(
                f"efficient_probing: the width {anatomy.embed_dim} must be a multiple of d_out * num_queries, "
                f"got {self.d_out} * {self.num_queries}. Closest that fits: 1 * {near}."
            )
        if anatomy.final_norm is not None:
            edits.set(model, anatomy.final_norm, nn.Identity())
        if anatomy.features_only:
            return ProbeMap(anatomy, self)
        probe = ProbeHead(anatomy, self)
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

    def shares(self, tokens: Tensor) -> Tensor:
        """What each token gives to the output, N a_m V^(m) (B, N, E); the mean over the tokens is the output."""
        weights = (self.attention(tokens) * tokens.shape[1]).to(tokens.dtype).transpose(1, 2)  # B, N, Q
        values = self.v(tokens).unflatten(2, (self.queries.shape[0], -1))  # B, N, Q, E/Q
        return (values * weights[..., None]).flatten(2)


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
        x = normalise(self.norm, self.probe(self.tokens(x)))
        return x if pre_logits else classify(model, x)


class ProbeMap(nn.Module):
    """The last map of a `features_only` model to one of E channels on the same grid."""

    def __init__(self, anatomy: Anatomy, options: EfficientProbing) -> None:
        super().__init__()
        self.channels_last, self.prefix, self.stride = anatomy.channels_last, anatomy.num_prefix_tokens, anatomy.stride
        self.probe = EfficientProbe(anatomy.embed_dim, options.num_queries, options.d_out)

    def tokens(self, features: Tensor) -> Tensor:
        """The tokens (B, N, D) that the queries see, of maps or of tokens with a prefix."""
        if features.ndim == 3:
            return features[:, self.prefix :]
        return (features if self.channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)

    def readout(self, x: Tensor, channels_last: bool) -> Tensor:
        """(B, D, H, W) -> (B, E, H, W); (B, H, W, D) and (B, N, D) likewise."""
        if x.ndim == 3:
            return self.probe.shares(x)
        maps = x if channels_last else x.permute(0, 2, 3, 1)
        maps = self.probe.shares(maps.flatten(1, 2)).unflatten(1, maps.shape[1:3])
        return maps if channels_last else maps.permute(0, 3, 1, 2)

    def forward_maps(self, model: Any, run: Callable[..., Any], x: Tensor) -> Any:
        """In the place of timm's list or dictionary of layers."""
        maps = run(x)
        if isinstance(maps, dict):
            name = list(maps)[-1]
            return {name: self.readout(maps[name], self.channels_last)}
        return [self.readout(maps[-1], self.channels_last)]

    def forward_intermediates(self, model: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of the backbone's own, in any of timm's forms."""
        out = run(*args, **kwargs)
        channels_last = kwargs.get("output_fmt") == "NHWC"
        if isinstance(out, dict):
            return {**out, "image_intermediates": [self.readout(out["image_intermediates"][-1], channels_last)]}
        if isinstance(out, list):
            return [self.readout(out[-1], channels_last)]
        return out[0], [self.readout(out[1][-1], channels_last)]

    def describe_maps(self, source: Any, edits: Edits) -> None:
        """Make timm's `features_only` model say that there is one map, and compute no other."""
        row = {"num_chs": self.probe.v.out_features, "reduction": self.stride, "module": "adapters.efficient_probing"}
        edits.set(source, "out_indices", source.feature_info.out_indices[-1:])
        edits.set(source, "feature_info", FeatureInfo([row], (0,)))


def query_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Where each query looks: attention maps (B, Q, H, W) of the efficient probe on `model`.

    Args:
        model: A model with ``efficient_probing`` attached, or a `Segmenter` on one.
        images: (B, C, height, width).

    Raises:
        VizattnError: efficient probing is not attached.
    """
    probes: list[Any] = [a.module for a in attached(model) if a.method == "efficient_probing"]
    if not probes:
        raise VizattnError("query_maps needs a model with 'efficient_probing' attached.")
    inner: Any = core(model)
    if isinstance(inner, FeatureDictNet):
        features = list(inner._collect(images).values())[-1]
    else:
        features = inner.forward_features(images)
    maps = probes[0].probe.attention(probes[0].tokens(features))
    if features.ndim == 4:
        return maps.unflatten(2, features.shape[1:3] if probes[0].channels_last else features.shape[2:])
    grid = inner.patch_embed.dynamic_feat_size(images.shape[-2:])
    return maps[:, :, maps.shape[2] - grid[0] * grid[1] :].unflatten(2, grid)
