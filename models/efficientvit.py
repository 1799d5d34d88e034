"""EfficientViT-M: depthwise convolutions and feed-forward layers around one cascaded group attention a block.

EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (Liu et al.), arXiv:2305.07027.

Shapes: B batch, C channels, H x W map. Strides of the maps: 16, 32, 64.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    DropPath,
    NormMlpClassifierHead,
    SqueezeExcite,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import PretrainedCfg, checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention import CascadedGroupAttention
from vizattn.attention.cascaded_group import offset_index
from vizattn.layers import ConvNorm, PooledNorm
from vizattn.layers.conv_norm import fold_after

from ._build import build, glyphs_cfg, imagenet_cfg
from ._checkpoint import Renames, check_fit, rename, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["EfficientViT"]


class ResidualDepthwise(ConvNorm):
    """x + bn(3 x 3 depthwise(x)): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(dim, dim, 3, groups=dim, bn_weight_init=0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The one depthwise convolution that this is in inference: the identity is 1 in the kernel's middle."""
        fold_after(self.conv, self.bn)
        self.conv.weight[:, :, 1, 1] += 1
        return self.conv


class FeedForward(nn.Module):
    """x + two 1 x 1 convolutions of it with ReLU between: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden, device=device, dtype=dtype)
        self.pw2 = ConvNorm(hidden, dim, bn_weight_init=0, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.drop_path(self.drop(self.pw2(F.relu(self.pw1(x), inplace=True))))


class PatchMerging(nn.Module):
    """An inverted residual block of stride 2, without residual: (B, C, H, W) -> (B, out_dim, ceil(H/2), ceil(W/2))."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden, **dd)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden, **dd)
        self.se = SqueezeExcite(hidden, rd_ratio=0.25, **dd)
        self.conv3 = ConvNorm(hidden, out_dim, **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))."""
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class Block(nn.Module):
    """Depthwise convolution, feed-forward, attention, depthwise convolution, feed-forward; all with residuals.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden channels of the feed-forward layers, in units of C.
        drop_path: Chance that a sample skips the attention or a feed-forward layer, arXiv:1603.09382.
        proj_drop: Dropout rate of attention and feed-forward layers.
        **kwargs: Options of the attention.
    """

    def __init__(
        self, dim: int, mlp_ratio: float = 2.0, drop_path: float = 0.0, proj_drop: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__()
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        hidden = int(dim * mlp_ratio)
        self.dw0 = ResidualDepthwise(dim, **dd)
        self.ffn0 = FeedForward(dim, hidden, proj_drop, drop_path, **dd)
        self.attn = CascadedGroupAttention(dim, proj_drop=proj_drop, **kwargs)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.dw1 = ResidualDepthwise(dim, **dd)
        self.ffn1 = FeedForward(dim, hidden, proj_drop, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.ffn0(self.dw0(x))
        x = x + self.drop_path(self.attn(x))
        return self.ffn1(self.dw1(x))


class Stage(nn.Module):
    """Halving of the map (but for the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class EfficientViT(nn.Module):
    """EfficientViT-M: a pyramid of three stages at strides 16, 32 and 64. Takes images of any size.

    The stem and each halving round up. A map that is larger than a stage's window is cut into equal windows no larger
    than it; the last ones are filled up with positions that nobody sees. A smaller map is one window.
    At 224 the maps are 14, 7 and 4, and the windows 7, 7 and 4. Biases by distance are used as they are at every size.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", or another pooling of timm; "" for none.
        embed_dims: Channels of the stages.
        depths: Blocks of the stages.
        num_heads: Attention heads of the stages.
        window_sizes: Windows of the stages.
        kernel_sizes: Of the depthwise convolutions on the queries, head by head.
        key_dim: Channels of queries and keys a head.
        mlp_ratio: Hidden channels of the feed-forward layers, in units of the stage's.
        stem_strides: Of the convolutions of the stem: the first halve the image, the last keep the size.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and feed-forward layers.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Heads that do not divide the channels, or fewer kernel sizes than heads.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 192),
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        window_sizes: Sequence[int] = (7, 7, 4),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        key_dim: int = 16,
        mlp_ratio: float = 2.0,
        stem_strides: Sequence[int] = (2, 2, 2, 2),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        widths = [embed_dims[0] >> i for i in reversed(range(len(stem_strides)))]
        layers: list[nn.Module] = []
        for before, after, stride in zip([in_chans, *widths], widths, stem_strides):
            layers += [ConvNorm(before, after, 3, stride=stride, **dd), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers[:-1])

        self.feature_info: list[dict[str, Any]] = []
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                before = embed_dims[i - 1]
                downsample = nn.Sequential(
                    ResidualDepthwise(before, **dd),
                    FeedForward(before, int(before * mlp_ratio), proj_drop_rate, **dd),
                    PatchMerging(before, dim, **dd),
                    ResidualDepthwise(dim, **dd),
                    FeedForward(dim, int(dim * mlp_ratio), proj_drop_rate, **dd),
                )
            blocks = [
                Block(
                    dim,
                    mlp_ratio=mlp_ratio,
                    num_heads=num_heads[i],
                    window_size=window_sizes[i],
                    key_dim=key_dim,
                    kernel_sizes=kernel_sizes,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates[i]
            ]
            stages.append(Stage(downsample, blocks))
            reduction = math.prod(stem_strides) * 2**i
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": reduction})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=PooledNorm, **dd
        )
        fc = self.head.fc
        if isinstance(fc, nn.Linear):
            trunc_normal_(fc.weight, std=0.02)
            nn.init.zeros_(fc.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters an optimizer should not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters from stem to head, for layer-wise learning rates."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

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
        """Replace the last layer (0 classes: none), and the pooling if one is given; the norm before it stays."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after chosen stages, see `stage_intermediates`.

        Args:
            x: Images (B, in_chans, height, width).
            indices: Stages to take: a list (negative counts from the end), the last n, or None for all.
            norm: Apply the final norm (there is none here) to the last map.
            stop_early: Do not run stages after the last one taken.
            output_fmt: Only "NCHW".
            intermediates_only: Leave out the final features.

        Returns:
            (final features (B, C, H, W), list of maps), or only the list.

        Raises:
            VizattnError: Another `output_fmt`.
        """
        return stage_intermediates(
            x,
            self._stem,
            self.stages,
            self.norm,
            indices=indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages, and as asked the head, that the chosen intermediates do not need; give the indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.head.reset(0, "", reset_other=True)
            self.num_classes = 0
        return take_indices

    def _stem(self, x: Tensor) -> Tensor:
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> map (B, C, H, W)."""
        return self.norm(self.stages(self._stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, H, W) -> logits (B, num_classes), or the pooled, normed features (B, C) the classifier gets."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Table 2 of arXiv:2305.07027. The nano size is for images of 32 x 32: maps 16, 8 and 4.
SIZES: dict[str, dict[str, Any]] = {
    "efficientvit_va_nano": {
        "embed_dims": (48, 80, 96),
        "depths": (1, 2, 2),
        "num_heads": (3, 4, 4),
        "window_sizes": (8, 8, 4),
        "kernel_sizes": (5, 5, 3, 3),
        "stem_strides": (2, 1),
    },
    "efficientvit_va_m0": {},
    "efficientvit_va_m1": {"embed_dims": (128, 144, 192), "num_heads": (2, 3, 3), "kernel_sizes": (7, 5, 3, 3)},
    "efficientvit_va_m2": {"embed_dims": (128, 192, 224), "num_heads": (4, 3, 2), "kernel_sizes": (7, 5, 3, 3)},
    "efficientvit_va_m3": {"embed_dims": (128, 240, 320), "num_heads": (4, 3, 4)},
    "efficientvit_va_m4": {"embed_dims": (128, 256, 384), "kernel_sizes": (7, 5, 3, 3)},
    "efficientvit_va_m5": {
        "embed_dims": (192, 288, 384),
        "depths": (1, 3, 4),
        "num_heads": (3, 3, 4),
        "kernel_sizes": (7, 5, 3, 3),
    },
}

RELEASE = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        **{
            "pool_size": (4, 4),
            "crop_pct": 0.875,
            "first_conv": "stem.0.conv",
            "classifier": "head.fc",
            "license": "mit",
            "paper_ids": "arXiv:2305.07027",
            "origin_url": "https://github.com/microsoft/Cream/tree/main/EfficientViT",
            **kwargs,
        }
    )


# The same weights twice: timm's copy on the hub (the default), and the authors' files.
default_cfgs = generate_default_cfgs(
    {
        "efficientvit_va_nano.glyphs": _cfg(
            **glyphs_cfg(
                "efficientvit_va_nano", pool_size=(4, 4), first_conv="stem.0.conv", license="apache-2.0", origin_url=""
            )
        ),
        **{f"efficientvit_va_m{i}.r224_in1k": _cfg(hf_hub_id=f"timm/efficientvit_m{i}.r224_in1k") for i in range(6)},
        **{f"efficientvit_va_m{i}.in1k": _cfg(url=f"{RELEASE}/efficientvit_m{i}.pth") for i in range(6)},
    }
)

# Names of the release and of timm, which hold the same tensors, to ours.
RENAMES: list[tuple[str, Any]] = [
    (r"^patch_embed\.conv(\d)\.", lambda m: f"stem.{2 * int(m[1]) - 2}."),
    (r"^patch_embed\.", "stem."),
    (r"^blocks1\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"^blocks(\d)\.0\.(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}."),
    (r"^blocks(\d)\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.2."),
    (r"^blocks(\d)\.2\.(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{int(m[2]) + 3}."),
    (r"^blocks(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
    (r"\.downsample\.res1\.", ".downsample."),
    (r"\.downsample\.patchmerge\.", ".downsample.2."),
    (r"\.downsample\.res2\.(\d)\.", lambda m: f".downsample.{int(m[1]) + 3}."),
    (r"\.mixer\.m\.attn\.proj\.1\.", ".attn.proj."),
    (r"\.mixer\.m\.attn\.qkvs\.(\d)\.(c|conv)\.", r".attn.qkvs.\1.linear."),
    (r"\.mixer\.m\.attn\.", ".attn."),
    (r"\.m\.", "."),
    (r"\.c\.", ".conv."),
    (r"^head\.bn\.", "head.norm."),
    (r"^head\.(l|linear)\.", "head.fc."),
]


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: EfficientViT) -> dict[str, Tensor]:
    """Fit weights of the release, of timm or of ours to `model`; tables of other windows are resized.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    expected = model.state_dict()
    state_dict = {}
    for key, value in unwrap(checkpoint).items():
        if key.endswith("attention_bias_idxs"):  # computed
            continue
        if key not in expected:
            for pattern, name in RENAMES:
                key = re.sub(pattern, name, key)
        like = expected.get(key)
        if like is not None and {like.ndim, value.ndim} == {2, 4} and like.numel() == value.numel():
            value = value.view(like.shape)  # a matrix and a 1 x 1 convolution
        if key.endswith("attention_biases") and like is not None and value.shape[1:] != like.shape[1:]:
            value = _resized_table(value, math.isqrt(like.shape[1]))
        state_dict[key] = value
    check_fit(state_dict, model, adapted=("head.fc.", "stem.0.conv."))
    return state_dict


def _residual(text: str) -> Renames:
    return [
        (r"\.(dw0|dw1|ffn0|ffn1)\.", r".\1.m."),
        (r"\.attn\.", ".mixer.m.attn."),
        (r"\.attn\.proj\.", ".attn.proj.1."),
        (r"^head\.norm\.", "head.bn."),
        (r"\.(conv|linear)\.", f".{text}."),
    ]


IN_RELEASE: Renames = [
    (r"^stem\.", "patch_embed."),
    (r"^stages\.0\.blocks\.", "blocks1."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}."),
    (r"^stages\.(\d)\.downsample\.([01])\.", lambda m: f"blocks{int(m[1]) + 1}.0.{m[2]}.m."),
    (r"^stages\.(\d)\.downsample\.2\.", lambda m: f"blocks{int(m[1]) + 1}.1."),
    (r"^stages\.(\d)\.downsample\.([34])\.", lambda m: f"blocks{int(m[1]) + 1}.2.{int(m[2]) - 3}.m."),
    (r"^head\.fc\.", "head.l."),
    *_residual("c"),
]
IN_TIMM: Renames = [
    (r"^stem\.(\d)\.", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}."),
    (r"\.downsample\.([01])\.", r".downsample.res1.\1.m."),
    (r"\.downsample\.2\.", ".downsample.patchmerge."),
    (r"\.downsample\.([34])\.", lambda m: f".downsample.res2.{int(m[1]) - 3}.m."),
    *_residual("conv"),
    (r"^head\.fc\.", "head.linear."),
]


def released_layout(state_dict: dict[str, Tensor], model: EfficientViT, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the authors' release, with its index tables, or as timm's file on the hub."""
    released = {}
    for key, value in state_dict.items():
        if ".qkvs." in key and value.ndim == 2:
            value = value[..., None, None]
        released[key := rename(key, IN_TIMM if cfg.hf_hub_id else IN_RELEASE)] = value
        if key.endswith("attention_biases") and not cfg.hf_hub_id:
            window = math.isqrt(value.shape[1])
            released[f"{key.removesuffix('es')}_idxs"] = offset_index(window, window, window).view(window**2, -1)
    return released if cfg.hf_hub_id else {"model": released}


def _resized_table(table: Tensor, window: int) -> Tensor:
    """Biases by distance (h, r * r) for another window: stretched, since a map of more positions shows the same."""
    square = table.unflatten(1, (math.isqrt(table.shape[1]), -1))[None]
    return F.interpolate(square, (window, window), mode="bicubic", align_corners=False)[0].flatten(1)


def _create(name: str, pretrained: bool, **kwargs: Any) -> EfficientViT:
    return build(
        EfficientViT,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": (0, 1, 2), "flatten_sequential": True},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
