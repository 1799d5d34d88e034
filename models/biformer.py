"""BiFormer: a pyramid whose tokens attend to the regions of the map that matter to them.

BiFormer: Vision Transformer with Bi-Level Routing Attention (Zhu et al., CVPR 2023), arXiv:2303.08810.
The attention itself is `vizattn.attention.BilevelRoutingAttention`; the last stage attends to all tokens.

Shapes: B batch, H x W tokens of a map, C channels. Maps (B, C, H, W) between blocks, tokens (B, H * W, C) inside.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import PretrainedCfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention import BilevelRoutingAttention
from vizattn.attention.maps import AttentionCall, AttentionMap, map_of, softmax_map
from vizattn.errors import VizattnError
from vizattn.layers import ConvNorm, LayerNorm, Linear, Mlp
from vizattn.layers.conv_norm import fold_after

from ._build import build, glyphs_cfg, imagenet_cfg
from ._checkpoint import Renames, check_fit, rename, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["BiFormer"]


class LePEAttention(nn.Module):
    """Softmax attention over all tokens of a map, with a depthwise convolution of its *input* added to what it gives.

    It takes extra keys, but no prefix tokens.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim`.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.

    Raises:
        VizattnError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, dim * 3, bias=False, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        kv = F.linear(tokens, self.qkv.weight[tokens.shape[-1] :]).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(self, x: Tensor, grid_size: tuple[int, int], extra_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, H * W, C) -> the same; every token may attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        local = self.lepe(x.reshape(B, grid_size[0], grid_size[1], C).permute(0, 3, 1, 2))
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if extra_kv is not None:
            key = torch.cat([key, extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2)
            value = torch.cat([value, extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2)
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x + local.permute(0, 2, 3, 1).reshape(B, N, C)))


@map_of.register
def _(attn: LePEAttention, call: AttentionCall) -> AttentionMap:
    query, key, value = attn.qkv(call.x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return softmax_map("softmax", query, key, value, call.grid_size, extra_kv=call.extra_kv)


class BiFormerBlock(nn.Module):
    """Positions by a depthwise convolution, then attention, then an MLP, each added to its input.

    Args:
        dim: Channels C.
        attn: The attention, called with tokens (B, H * W, C) and (H, W).
        mlp_ratio: Hidden channels of the MLP, in units of C.
        pos_conv: Whether there is the convolution for positions.
        proj_drop: Dropout rate of the MLP.
        drop_path: Chance that a sample skips the attention, and again the MLP, in training, arXiv:1603.09382.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 3.0,
        pos_conv: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_conv else None
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.mlp.fc1, self.mlp.fc2 = Linear(dim, int(dim * mlp_ratio), **dd), Linear(int(dim * mlp_ratio), dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), channels last in memory."""
        B, C, H, W = x.shape
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        x = x + self.drop_path1(self.attn(self.norm1(x), (H, W)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


class BiFormerStage(nn.Module):
    """Halve the map (but in the first stage), then the blocks.

    Args:
        downsample: What comes before the blocks.
        blocks: The blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), or the same height and width in the first stage."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x
        return self.blocks(x)


class PatchConvNorm(ConvNorm):
    """`ConvNorm` on patches that do not overlap; a map that they do not divide is filled up with zeros."""

    def __init__(self, in_chs: int, out_chs: int, patch_size: int, **dd: Any) -> None:
        super().__init__(in_chs, out_chs, patch_size, stride=patch_size, padding=0, bias=True, **dd)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / p), ceil(W / p))."""
        return self.bn(self.conv(F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))))

    @torch.no_grad()
    def fuse(self) -> nn.Module:  # type: ignore[override]
        """Itself, the norm folded into the convolution: the filling up is still needed."""
        if not isinstance(self.bn, nn.Identity):
            fold_after(self.conv, self.bn)
            self.bn = nn.Identity()  # type: ignore[assignment]
        return self


class BiFormer(nn.Module):
    """Pyramid of four stages (or fewer): bi-level routing attention, and full attention in the last.

    Takes images of any size; maps that the regions do not divide end in smaller regions.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" to keep the map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratio: Hidden channels of the MLPs, in units of C.
        topk: Regions that a region is routed to, in each stage but the last.
        n_win: Regions along each side of a map; they grow with the image.
        region_size: Tokens along each side of a region instead, whatever the image; see `BilevelRoutingAttention`.
        head_dim: Channels a head of the routing attention.
        last_heads: Heads of the full attention in the last stage.
        stem_stride: 4, or 2 for small images.
        patchify: Swin-tiny layout: patches that do not overlap in stem (4 x 4) and downsampling (2 x 2), and no
            convolution for positions.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Lists of lengths that do not fit each other, another `stem_stride`, or heads that do not divide
            the channels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        mlp_ratio: float = 3.0,
        topk: Sequence[int] = (1, 4, 16),
        n_win: int = 7,
        region_size: int | None = None,
        head_dim: int = 32,
        last_heads: int = 8,
        stem_stride: int = 4,
        patchify: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not len(embed_dims) == len(depths) == len(topk) + 1:
            raise VizattnError(
                f"embed_dims and depths need an entry a stage and topk one fewer, not {len(embed_dims)}, {len(depths)} "
                f"and {len(topk)}."
            )
        if stem_stride not in (2, 4) or (patchify and stem_stride == 2):
            raise VizattnError(f"stem_stride must be 4, or 2 without patchify, not {stem_stride}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        dim = embed_dims[0]
        if patchify:
            self.stem: nn.Module = PatchConvNorm(in_chans, dim, 4, **dd)
        else:
            self.stem = nn.Sequential(
                ConvNorm(in_chans, dim // 2, 3, 2, bias=True, **dd),
                nn.GELU(),
                ConvNorm(dim // 2, dim, 3, stem_stride // 2, bias=True, **dd),
            )
        stages: list[nn.Module] = []
        self.feature_info = []
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                before = embed_dims[i - 1]
                downsample = (
                    PatchConvNorm(before, dim, 2, **dd) if patchify else ConvNorm(before, dim, 3, 2, bias=True, **dd)
                )
            blocks: list[nn.Module] = []
            for j in range(depth):
                attn: nn.Module
                if i < len(depths) - 1:
                    if dim % head_dim:
                        raise VizattnError(f"head_dim {head_dim} does not divide the {dim} channels of stage {i}.")
                    attn = BilevelRoutingAttention(
                        dim, dim // head_dim, topk=topk[i], n_win=n_win, region_size=region_size, **drops, **dd
                    )
                else:
                    attn = LePEAttention(dim, last_heads, **drops, **dd)
                blocks.append(BiFormerBlock(dim, attn, mlp_ratio, not patchify, proj_drop_rate, drop_paths[i][j], **dd))
            stages.append(BiFormerStage(downsample, blocks))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": stem_stride * 2**i})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters an optimizer should not decay, besides vectors."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters from stem to head, for layer-wise learning rates."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head (0 classes: none), keeping type, device, mode, and the pooling unless one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after chosen stages; see `stage_intermediates`."""
        return stage_intermediates(
            x, self.stem, self.stages, self.norm, indices, norm, stop_early, output_fmt, intermediates_only
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one taken, and as asked for the final norm and the head."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:  # the norm has the width of the last stage
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, C, H, W)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Table 1 and section 4.4 (stl) of arXiv:2303.08810.
BASE_DIMS = (96, 192, 384, 768)
SIZES: dict[str, dict[str, Any]] = {
    "biformer_nano": {
        "embed_dims": (32, 64, 128),
        "depths": (2, 3, 2),
        "topk": (2, 4),
        "n_win": 4,
        "stem_stride": 2,
    },
    "biformer_tiny": {"depths": (2, 2, 8, 2)},
    "biformer_small": {"depths": (4, 4, 18, 4)},
    "biformer_base": {"depths": (4, 4, 18, 4), "embed_dims": BASE_DIMS},
    "biformer_stl": {"depths": (2, 2, 6, 2), "embed_dims": BASE_DIMS, "mlp_ratio": 4.0, "patchify": True},
}


def _cfg(share: str, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        url=f"https://api.onedrive.com/v1.0/shares/s!{share}/root/content",
        license="mit",
        paper_ids="arXiv:2303.08810",
        origin_url="https://github.com/rayleizhu/BiFormer",
        crop_pct=0.875,
        **{"first_conv": "stem.0.conv", "classifier": "head.fc", **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {
        "biformer_nano.glyphs": glyphs_cfg(
            "biformer_nano",
            pool_size=(4, 4),
            first_conv="stem.0.conv",
            classifier="head.fc",
            paper_ids="arXiv:2303.08810",
        ),
        "biformer_tiny.in1k": _cfg("AkBbczdRlZvChHEOoGkgwgQzEDlM"),
        "biformer_small.in1k": _cfg("AkBbczdRlZvChHDyM-x9KWRBZ832"),
        "biformer_base.in1k": _cfg("AkBbczdRlZvChHI_XPhoadjaNxtO"),
        "biformer_stl.in1k": _cfg("AkBbczdRlZvChSf-m7ujkvx9lIQ1", first_conv="stem.conv"),
    }
)

#: Released key -> ours, tried in order; keys of ours are left as they are.
RENAMED = (
    (r"^downsample_layers\.0\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.0.bn."),
    (r"^downsample_layers\.0\.3\.", "stem.2.conv."),
    (r"^downsample_layers\.0\.4\.", "stem.2.bn."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.bn."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),  # 2 in stl
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: BiFormer) -> dict[str, Tensor]:
    """Released weights under our keys.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = {}
    for key, value in unwrap(checkpoint).items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        if isinstance(model.stem, PatchConvNorm):
            key = key.replace("stem.0.", "stem.")
        state_dict[key] = value
    first_conv = "stem.conv.weight" if isinstance(model.stem, PatchConvNorm) else "stem.0.conv.weight"
    check_fit(state_dict, model, adapted=("head.fc.", first_conv))
    return state_dict


RELEASED: Renames = (
    (r"^stem\.0\.conv\.", "downsample_layers.0.0."),
    (r"^stem\.0\.bn\.", "downsample_layers.0.1."),
    (r"^stem\.2\.conv\.", "downsample_layers.0.3."),
    (r"^stem\.2\.bn\.", "downsample_layers.0.4."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.0."),
    (r"^stages\.(\d+)\.downsample\.bn\.", r"downsample_layers.\1.1."),
    (r"^(stages\.[012]\..*\.attn)\.qkv\.", r"\1.qkv.qkv."),
    (r"^(stages\.[012]\..*\.attn)\.proj\.", r"\1.wo."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^head\.fc\.", "head."),
)


def released_layout(state_dict: dict[str, Tensor], model: BiFormer, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the release."""
    if isinstance(model.stem, PatchConvNorm):  # stl
        renames = [(r"^stem\.", "stem.0."), *RELEASED, (r"\.mlp\.3\.", ".mlp.2.")]
    else:
        renames = [*RELEASED, (r"^stages\.(\d+)\.blocks\.", r"stages.\1.")]
    return {"model": {rename(key, renames): value for key, value in state_dict.items()}}


def _create(name: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    return build(
        BiFormer,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": tuple(range(len(SIZES[name]["depths"]))), "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
