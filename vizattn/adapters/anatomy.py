"""Where blocks, attentions, norms and tokens sit in a model: the only place that knows other people's classes.

vizattn's own backbones are known by what their parts are called, so that a new one needs nothing here: a block has the
attention as `attn`, what comes before it as `norm1`; models of one grid have `blocks`, pyramids have not.

Shapes: B batch, N tokens, D width of the tokens, H heads, d width of a head, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureInfo
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vizattn.attention import softmax_attention
from vizattn.errors import VizattnError
from vizattn.heads import Segmenter

__all__ = [
    "Anatomy",
    "BlockAnatomy",
    "attend",
    "classifiers",
    "core",
    "describe",
    "map_source",
    "position_bias",
    "project_kv",
    "project_qkv",
    "rotate",
]

#: timm's attentions whose projections, position terms and output path `attend` reproduces.
SOFTMAX_ATTENTION = (Attention, AttentionRope, EvaAttention, BeitAttention, SwinAttention)
#: timm's attentions with an output projection `proj`, whatever happens before it.
PROJECTED_ATTENTION = (*SOFTMAX_ATTENTION, SwinV2Attention)
POST_NORM_BLOCKS = (ResPostBlock, EvaBlockPostNorm, SwinTransformerV2Block)

SUPPORTED = (
    "vizattn's backbones, timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP and SigLIP towers, MAE), "
    "Eva (EVA, EVA02, DINOv3), Beit (BEiT, BEiTv2), SwinTransformer and SwinTransformerV2"
)


@dataclass(frozen=True)
class BlockAnatomy:
    """One transformer block: its parts by role."""

    block: Any
    attn: Any
    pre_norm: nn.Module | None
    """What the tokens pass before the attention; None in post-norm blocks and where there is no norm."""

    @property
    def norms(self) -> list[nn.Module]:
        """The two norms of the block."""
        return [self.block.norm1, self.block.norm2]

    @property
    def dim(self) -> int:
        """Width of the tokens that the attention reads."""
        return int((self.attn.qkv if getattr(self.attn, "qkv", None) is not None else self.attn.q_proj).in_features)

    @property
    def protocol(self) -> bool:
        """Whether the attention itself takes `extra_kv` and inserted tokens, see `vizattn.attention`."""
        return hasattr(self.attn, "project_kv")

    @property
    def takes_extra_kv(self) -> bool:
        """Whether this attention can be given more keys and values."""
        return self.protocol or isinstance(self.attn, SOFTMAX_ATTENTION)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, P, d) of tokens (B, P, D) as they are before the block."""
        tokens = tokens if self.pre_norm is None else self.pre_norm(tokens)
        return self.attn.project_kv(tokens) if self.protocol else project_kv(self.attn, tokens)

    def attend(self, x: Tensor, extra_kv: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The attention's own forward, with more keys and values (B or 1, H, P, d)."""
        if self.protocol:  # by the class: an adapter may have replaced the forward of this object
            return type(self.attn).forward(self.attn, x, *args, extra_kv=extra_kv, **kwargs)
        return attend(self.attn, x, extra_kv, **kwargs)

    @property
    def projection(self) -> tuple[nn.Module, str]:
        """The attention's output projection, a linear layer or 1 x 1 convolution: the module it is in, and its name."""
        owner, name = self.attn, "proj"
        if not hasattr(self.attn, "proj"):  # HaloNet's bottleneck: the convolution that widens again
            owner, name = self.block, "conv2"
        while not isinstance(getattr(owner, name), nn.Linear | nn.Conv2d):
            owner = getattr(owner, name)
            name = next(n for n, m in owner.named_children() if any(True for _ in m.parameters()))
        return owner, name


@dataclass(frozen=True)
class Anatomy:
    """What adapters need to know of a model."""

    family: str
    blocks: list[BlockAnatomy]
    isotropic: bool
    """Tokens of one width on one grid, (B, N, D) throughout; else a pyramid of maps."""
    channels_last: bool
    """Whether `forward_features` of a pyramid gives maps (B, H, W, D), as timm's Swin; else (B, D, H, W)."""
    num_prefix_tokens: int
    """Class and register tokens before the patch tokens."""
    has_class_token: bool
    features_only: bool
    """Whether maps are read, the last of them at the end; else one vector of features."""
    embed_dim: int
    """Width of the features: of the last map that is read, if maps are."""
    stride: int
    """Pixels of the image for one position of the features."""
    final_norm: str | None
    """Name of the norm between the last block and the features, if there is one."""


def core(model: nn.Module) -> nn.Module:
    """The model inside a `Segmenter` and timm's `features_only` wrapper, else the model itself."""
    model = model.backbone if isinstance(model, Segmenter) else model
    return model.model if isinstance(model, FeatureGetterNet) else model


def map_source(model: nn.Module) -> Any:
    """What gives the maps: timm's `features_only` model, itself or in a `Segmenter`; None where there is none."""
    model = model.backbone if isinstance(model, Segmenter) else model
    return model if isinstance(getattr(model, "feature_info", None), FeatureInfo) else None


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of `model`.

    Raises:
        VizattnError: the architecture is not known; the message lists what is.
    """
    source = map_source(model)
    model = core(model)
    modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "attn", None), nn.Module)]
    blocks = [
        BlockAnatomy(m, m.attn, None if isinstance(m, POST_NORM_BLOCKS) else getattr(m, "norm1", None))
        for m in modules
        if _is_ours(m.attn) or (isinstance(m.attn, PROJECTED_ATTENTION) and hasattr(m, "norm1") and hasattr(m, "norm2"))
    ]
    family = _family(model, blocks)
    isotropic = hasattr(model, "blocks")
    known = [b.block for b in blocks]
    stack: Any = model.blocks if isotropic else []
    last: Any = (model.feature_info if source is None else source.feature_info.get_dicts())[-1]  # type: ignore[index]
    odd = [
        type(b).__name__ + (f" with {type(b.attn).__name__}" if hasattr(b, "attn") else "")
        for b in stack
        if b not in known
    ]
    if family is None or not blocks or odd:
        why = f" (its blocks are {odd[0]})" if odd and family else ""
        raise VizattnError(
            f"No adapter with inner parts attaches to {type(model).__name__}{why}. Supported: {SUPPORTED}."
        )
    return Anatomy(
        family=family,
        blocks=blocks,
        isotropic=isotropic,
        channels_last=family == "swin",
        num_prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
        has_class_token=getattr(model, "cls_token", None) is not None,
        features_only=source is not None,
        embed_dim=int(model.num_features if source is None else last["num_chs"]),  # type: ignore[arg-type]
        stride=int(last["reduction"]),
        final_norm=_final_norm(model),
    )


def _final_norm(model: nn.Module) -> str | None:
    norm = getattr(model, "norm", None)
    # Large HaloNets have a convolution there, which is a layer like others.
    return "norm" if isinstance(norm, nn.Module) and all(p.ndim < 2 for p in norm.parameters()) else None


def _is_ours(attn: nn.Module) -> bool:
    return type(attn).__module__.startswith("vizattn.") or hasattr(attn, "project_kv")


def _family(model: nn.Module, blocks: list[BlockAnatomy]) -> str | None:
    if blocks and all(_is_ours(b.attn) for b in blocks):
        return "vizattn"
    for family, *classes in (
        ("vit", VisionTransformer),
        ("eva", Eva),
        ("beit", Beit),
        ("swin", SwinTransformer, SwinTransformerV2),
    ):
        if isinstance(model, tuple(classes)):
            return family
    swin_blocks = (SwinTransformerBlock, SwinTransformerV2Block)
    if isinstance(model, FeatureDictNet) and all(isinstance(b.block, swin_blocks) for b in blocks):
        return "swin"
    return None


def classifiers(model: Any) -> list[tuple[str, nn.Module]]:
    """The classifier layers of a timm model as (name, module), without those that are Identity."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    wanted = [m for m in (found if isinstance(found, tuple) else (found,)) if not isinstance(m, nn.Identity)]
    return [(name, m) for name, m in model.named_modules() if any(m is w for w in wanted)]


# --- attention with more keys and values ------------------------------------------------------------------------------


def _bias(attn: Any) -> Tensor | None:
    """The bias of a fused qkv projection (3A), also where it is kept in parts."""
    if getattr(attn, "q_bias", None) is not None:
        return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv.bias


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H*d) -> (B, H, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _norm(attn: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    return x if norm is None else norm(x)


def project_kv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, N, d) of normed tokens `x` (B, N, D); no position term is applied."""
    if getattr(attn, "qkv", None) is None:
        k, v = attn.k_proj(x), attn.v_proj(x)
        kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        k, v = _heads(k, kv_heads), _heads(v, kv_heads)
        return _repeat_kv(attn, _norm(attn, "k_norm", k)), _repeat_kv(attn, v)
    weight, bias = attn.qkv.weight, _bias(attn)
    dim = weight.shape[0] // 3
    kv = F.linear(x, weight[dim:], None if bias is None else bias[dim:])
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return _norm(attn, "k_norm", k), v


def project_qkv(attn: Any, x: Tensor, apart: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, d) of normed tokens `x` (B, N, D); no position term is applied.

    `apart`: keys and values have memory of their own, which is free again once they are joined with others.
    """
    if getattr(attn, "qkv", None) is None:
        q = _norm(attn, "q_norm", _heads(attn.q_proj(x), attn.num_heads))
        return q, *project_kv(attn, x)
    weight, bias = attn.qkv.weight, _bias(attn)
    if apart:
        dim = weight.shape[0] // 3
        q = F.linear(x, weight[:dim], None if bias is None else bias[:dim])
        return _norm(attn, "q_norm", _heads(q, attn.num_heads)), *project_kv(attn, x)
    qkv = F.linear(x, weight, bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return _norm(attn, "q_norm", q), _norm(attn, "k_norm", k), v


def _repeat_kv(attn: Any, x: Tensor) -> Tensor:
    groups = getattr(attn, "num_kv_groups", 1)
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def rotate(attn: Any, x: Tensor, rope: Tensor, prefix: int) -> Tensor:
    """Queries or keys (B, H, N, d), rotated from the token `prefix` on."""
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], rotated], dim=2).type_as(x)


def position_bias(attn: Any, shared: Tensor | None, mask: Tensor | None, batch: int) -> Tensor | None:
    """The additive bias, broadcastable to (B, H, N, N), of attentions with relative positions and windows."""
    bias = None
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias = attn._get_rel_pos_bias()
    if shared is not None:
        bias = shared if bias is None else bias + shared
    if mask is not None:  # windows of one image are neighbours in the batch
        windows, n = mask.shape[0], mask.shape[-1]
        mask = mask.view(1, windows, 1, n, n).expand(batch // windows, -1, -1, -1, -1).reshape(-1, 1, n, n)
        bias = mask if bias is None else bias + mask
    return bias


def attend(
    attn: Any,
    x: Tensor,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    inserted: int = 0,
    *,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    shared_rel_pos_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What `attn.forward(x)` computes, with more keys and values or with tokens that carry no position.

    Args:
        attn: One of `SOFTMAX_ATTENTION`.
        x: Normed tokens (B, N, D); the first `inserted` of them are not the model's own.
        extra_kv: Keys and values (B or 1, H, P, d) that every token may attend to.
        inserted: Tokens at the front that have neither rotation nor relative position bias.
        rope: Rotary table, as timm passes it.
        attn_mask: Boolean or additive mask, as timm passes it.
        is_causal: Not supported together with prompts.
        shared_rel_pos_bias: BEiT's bias shared by all blocks.
        mask: Swin's window mask (windows, N, N).

    Raises:
        VizattnError: causal attention was asked for.
    """
    if is_causal:
        raise VizattnError("Prompts cannot be used with causal attention (is_causal=True).")
    q, k, v = project_qkv(attn, x, apart=extra_kv is not None)
    if rope is not None:
        prefix = int(attn.num_prefix_tokens) + inserted
        q, k = rotate(attn, q, rope, prefix), rotate(attn, k, rope, prefix)
    bias = position_bias(attn, shared_rel_pos_bias, mask, x.shape[0]) if attn_mask is None else attn_mask
    prompts = 0
    if extra_kv is not None:
        extra_k, extra_v = (t.to(v.dtype).expand(x.shape[0], -1, -1, -1) for t in extra_kv)
        k, v = torch.cat([k, extra_k], dim=2), torch.cat([v, extra_v], dim=2)
        prompts = extra_k.shape[2]
    if bias is not None and (prompts or inserted):
        bias = F.pad(bias, (inserted, prompts, inserted, 0), value=True if bias.dtype == torch.bool else 0.0)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    drop = attn.attn_drop.p if attn.training else 0.0
    if bias is None:
        out = softmax_attention(q, k, v, drop, attn.scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=attn.scale)
    out = _norm(attn, "norm", out.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))
