"""L2ViT: a pyramid whose blocks take turns between windows and linear attention over the whole map.

The Linear Attention Resurrection in Vision Transformer (Zheng), arXiv:2501.16182.

Shapes: B batch, H x W tokens of a map, C channels. Maps (B, C, H, W), channels last in memory, between blocks; tokens
(B, H * W, C) inside.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import PretrainedCfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention import LinearAttention, LocalConcentration, WindowAttention
from vizattn.errors import VizattnError
from vizattn.layers import ConvNorm, Mlp

from ._build import build, glyphs_cfg, imagenet_cfg
from ._checkpoint import Renames, check_fit, rename, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["L2ViT"]


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map that has them last in memory: (B, C, H, W) -> the same, no copy."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class L2ViTBlock(nn.Module):
    """Positions by a depthwise convolution, attention, another depthwise mixing, MLP, each added to its input.

    The mixing in the middle is one more convolution for positions after window attention, and a normed
    `LocalConcentration` after linear attention.

    Args:
        dim: Channels C.
        attn: `LinearAttention` or `WindowAttention`.
        mlp_ratio: Hidden channels of the MLP, in units of C.
        proj_drop: Dropout rate of the MLP.
        drop_path: Chance that a sample skips an added branch in training (not the positions), arXiv:1603.09382.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2: nn.Module | None = None
        self.norm3: nn.Module | None = None
        self.lcm: nn.Module | None = None
        if isinstance(attn, LinearAttention):
            self.norm3 = MapNorm(dim, **dd)
            self.lcm = LocalConcentration(dim, **dd)
        else:
            self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), channels last in memory."""
        B, C, H, W = x.shape
        x = (x + self.cpe1(x)).permute(0, 2, 3, 1).reshape(B, H * W, C)
        x = x + self.drop_path1(self.attn(self.norm1(x), (H, W)))
        x = x.reshape(B, H, W, C).permute(0, 3, 1, 2)
        if self.cpe2 is not None:
            x = x + self.cpe2(x)
        if self.lcm is not None and self.norm3 is not None:
            x = x + self.drop_path1(self.lcm(self.norm3(x)))
        x = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Norm, then 2 x 2 patches that do not overlap; an odd map is filled up with zeros.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels C of the output.
    """

    def __init__(self, in_chs: int, out_chs: int, **dd: Any) -> None:
        super().__init__()
        self.norm = MapNorm(in_chs, **dd)
        self.conv = nn.Conv2d(in_chs, out_chs, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        return self.conv(F.pad(self.norm(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2)))


class L2ViTStage(nn.Module):
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


class L2ViT(nn.Module):
    """Pyramid of four stages (or fewer); blocks of even number attend in windows, those of odd number to all tokens.

    Takes images of any size; maps that the windows do not divide end in smaller windows.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" to keep the map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratio: Hidden channels of the MLPs, in units of C.
        window_size: Height and width of a window.
        min_sum: Lower bound of the sum of a query's weights, see `linear_attention`. The published 100 suits maps of
            a thousand tokens.
        stem_stride: 4, or 2 for small images.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights in windows.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Lists of lengths that do not fit each other, or another `stem_stride`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        min_sum: float = 100.0,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not len(embed_dims) == len(depths) == len(num_heads):
            raise VizattnError(
                f"embed_dims, depths and num_heads need an entry a stage, not {len(embed_dims)}, {len(depths)} and "
                f"{len(num_heads)}."
            )
        if stem_stride not in (2, 4):
            raise VizattnError(f"stem_stride must be 4 or 2, not {stem_stride}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        dim = embed_dims[0]
        self.stem = nn.Sequential(
            ConvNorm(in_chans, dim // 2, 3, 2, bias=True, **dd),
            nn.ReLU(),
            ConvNorm(dim // 2, dim, 3, stem_stride // 2, bias=True, **dd),
            MapNorm(dim, **dd),
        )
        stages: list[nn.Module] = []
        self.feature_info = []
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
                attn: nn.Module
                if j % 2 == 0:
                    attn = WindowAttention(dim, heads, window_size=window_size, rel_pos_bias=False, **drops, **dd)
                else:
                    attn = LinearAttention(dim, heads, min_sum=min_sum, **drops, **dd)
                blocks.append(L2ViTBlock(dim, attn, mlp_ratio, proj_drop_rate, drop_paths[i][j], **dd))
            stages.append(L2ViTStage(Downsample(embed_dims[i - 1], dim, **dd) if i > 0 else nn.Identity(), blocks))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": stem_stride * 2**i})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = MapNorm(self.num_features, **dd)
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


# Table 1 of arXiv:2501.16182.
BASE: dict[str, Any] = {
    "embed_dims": (128, 256, 512, 1024),
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
}
SIZES: dict[str, dict[str, Any]] = {
    "l2vit_nano": {
        "embed_dims": (32, 64, 128),
        "depths": (2, 2, 2),
        "num_heads": (2, 4, 8),
        "window_size": 4,
        "min_sum": 1.0,  # its maps have 256 tokens and fewer
        "stem_stride": 2,
    },
    "l2vit_tiny": {"depths": (2, 2, 6, 2)},
    "l2vit_small": {"depths": (2, 2, 18, 2)},
    "l2vit_base": BASE,
    "l2vit_base_window12_384": {**BASE, "window_size": 12},
}


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        url=f"https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/L2ViT-{file}.pth",
        license="mit",
        paper_ids="arXiv:2501.16182",
        origin_url="https://github.com/ChuanyangZheng/L2ViT",
        first_conv="stem.0.conv",
        classifier="head.fc",
        **{"crop_pct": 0.875, **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {
        "l2vit_nano.glyphs": glyphs_cfg(
            "l2vit_nano",
            pool_size=(4, 4),
            first_conv="stem.0.conv",
            classifier="head.fc",
            paper_ids="arXiv:2501.16182",
        ),
        "l2vit_tiny.in1k": _cfg("Tiny-checkpoint-best-ema"),
        "l2vit_small.in1k": _cfg("Small-checkpoint-best-ema"),
        "l2vit_base.in1k": _cfg("Base-checkpoint-best-ema"),
        "l2vit_base.in22k_ft_in1k": _cfg("Base-22k21k-finetune-224-checkpoint-best"),
        "l2vit_base_window12_384.in22k_ft_in1k": _cfg(
            "Base-22k21k-finetune-384-checkpoint-best", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        ),
    }
)

#: Released key -> ours, tried in order; keys of ours are left as they are.
RENAMED = (
    (r"^downsample_layers\.0\.proj\.proj\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.proj\.proj\.1\.", "stem.0.bn."),
    (r"^downsample_layers\.0\.proj\.proj\.3\.", "stem.2.conv."),
    (r"^downsample_layers\.0\.proj\.proj\.4\.", "stem.2.bn."),
    (r"^downsample_layers\.0\.norm\.", "stem.3."),
    (r"^downsample_layers\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.0\.proj\.", ".cpe1."),
    (r"\.cpe\.1\.proj\.", ".cpe2."),
    (r"\.local_mp\.", ".lcm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: L2ViT) -> dict[str, Tensor]:
    """Released weights under our keys.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = {}
    for key, value in unwrap(checkpoint).items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        state_dict[key] = value
    check_fit(state_dict, model, adapted=("head.fc.", "stem.0.conv.weight"))
    return state_dict


RELEASED: Renames = (
    (r"^stem\.0\.conv\.", "downsample_layers.0.proj.proj.0."),
    (r"^stem\.0\.bn\.", "downsample_layers.0.proj.proj.1."),
    (r"^stem\.2\.conv\.", "downsample_layers.0.proj.proj.3."),
    (r"^stem\.2\.bn\.", "downsample_layers.0.proj.proj.4."),
    (r"^stem\.3\.", "downsample_layers.0.norm."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"downsample_layers.\1.norm."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.cpe1\.", ".cpe.0.proj."),
    (r"\.cpe2\.", ".cpe.1.proj."),
    (r"\.lcm\.", ".local_mp."),
    (r"^head\.fc\.", "head."),
)


def released_layout(state_dict: dict[str, Tensor], model: L2ViT, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the release."""
    return {"model": {rename(key, RELEASED): value for key, value in state_dict.items()}}


def _create(name: str, pretrained: bool, **kwargs: Any) -> L2ViT:
    return build(
        L2ViT,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": tuple(range(len(SIZES[name]["depths"]))), "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
