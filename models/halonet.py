"""HaloNet: a ResNet whose 3 x 3 convolutions are halo attention.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones (Vaswani et al., CVPR 2021), arXiv:2103.12731.
The attention itself is `vizattn.attention.HaloAttention2d`.

Shapes: B batch, H x W map, C channels. Maps are (B, C, H, W), channels last in memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vizattn.attention import HaloAttention2d
from vizattn.errors import VizattnError
from vizattn.layers import ConvNorm

from ._build import build, glyphs_cfg, imagenet_cfg
from ._checkpoint import check_fit, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["HaloNet"]


class HaloBlock(nn.Module):
    """Bottleneck: narrow, attend, widen, add.

    Args:
        in_chs: Channels of the input.
        dim: Channels inside.
        out_chs: Channels of the output.
        attn: The attention, which may widen its values and halve the map.
        value_chs: Channels that the attention gives.
        stride: 2 if the attention halves the map.
        proj_drop: Dropout of the attention's output.
        drop_path: Stochastic depth.
    """

    def __init__(
        self,
        in_chs: int,
        dim: int,
        out_chs: int,
        attn: nn.Module,
        value_chs: int,
        stride: int = 1,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = ConvNorm(in_chs, dim, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.attn = attn
        self.norm = nn.BatchNorm2d(value_chs, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.proj_drop = nn.Dropout(proj_drop)
        self.conv2 = ConvNorm(value_chs, out_chs, bn_weight_init=0.0, **dd)
        self.shortcut = (
            ConvNorm(in_chs, out_chs, stride=stride, **dd) if stride > 1 or in_chs != out_chs else nn.Identity()
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, ceil(H / stride), ceil(W / stride))."""
        y = self.attn(self.act1(self.conv1(x)))
        y = self.conv2(self.proj_drop(self.act2(self.norm(y))))
        return self.act3(self.drop_path(y) + self.shortcut(x))


class HaloStage(nn.Module):
    """Blocks at one resolution, the first of which may halve the map.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), or the same height and width in the first stage."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x
        return self.blocks(x)


class HaloNet(nn.Module):
    """Residual network of halo attention. Takes images of any size; keys outside the map get no weight.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" to keep the map.
        embed_dims: Channels inside the blocks of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        block_size: Height and width b of a block of queries.
        halo_size: How far h a block sees beyond its border.
        value_ratio: Channels of the values, r_v, in units of `embed_dims`.
        bottleneck_ratio: Channels between the blocks, r_b, in units of `embed_dims`.
        final_dim: Channels of a convolution before pooling; 0 for none.
        stem_dim: Channels of the stem.
        stem_stride: 4, or 2 for small images.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout of the attentions' outputs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Lists of lengths that do not fit each other, another `stem_stride`, or widths that the heads do
            not divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        bottleneck_ratio: float = 1.0,
        final_dim: int = 0,
        stem_dim: int = 64,
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
            raise VizattnError(f"stem_stride must be 2 or 4, not {stem_stride}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        stem: list[nn.Module] = [ConvNorm(in_chans, stem_dim, 7, 2, **dd), nn.ReLU(inplace=True)]
        if stem_stride == 4:
            stem.append(nn.MaxPool2d(3, 2, 1))
        self.stem = nn.Sequential(*stem)
        stages: list[nn.Module] = []
        self.feature_info = []
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        chs = stem_dim
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                attn = HaloAttention2d(
                    dim, heads, block_size, halo_size, value_ratio, stride, attn_drop=attn_drop_rate, **dd
                )
                out_chs, value_chs = int(dim * bottleneck_ratio), int(dim * value_ratio)
                blocks.append(
                    HaloBlock(chs, dim, out_chs, attn, value_chs, stride, proj_drop_rate, drop_paths[i][j], **dd)
                )
                chs = out_chs
            stages.append(HaloStage(blocks))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": chs, "reduction": stem_stride * 2**i})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = nn.Identity()
        if final_dim > 0:
            self.norm = nn.Sequential(ConvNorm(chs, final_dim, **dd), nn.ReLU(inplace=True))
            chs = final_dim
        self.num_features = self.head_hidden_size = chs
        self.head = ClassifierHead(chs, num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters an optimizer should not decay, besides vectors: the tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("_rel")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters from stem to head, for layer-wise learning rates."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))],
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

    def _stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, C, H, W), channels last: there the attention splits heads by views."""
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after chosen stages, before the final convolution; see `stage_intermediates`."""
        return stage_intermediates(
            x, self._stem, self.stages, self.norm, indices, norm, stop_early, output_fmt, intermediates_only
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one taken, and as asked for the final convolution and the head.

        The final convolution goes with the last stage, whose channels it needs.
        """
        take_indices, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, C, H, W)."""
        return self.norm(self.stages(self._stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _size(
    block: int, halo: int, value_ratio: float, bottleneck_ratio: float, third: int, final: int = 0
) -> dict[str, Any]:
    return {
        "block_size": block,
        "halo_size": halo,
        "value_ratio": value_ratio,
        "bottleneck_ratio": bottleneck_ratio,
        "depths": (3, 3, third, 3),
        "final_dim": final,
    }


# Tables 2 and 3 of arXiv:2103.12731: b, h, r_v, r_b, l_3, final convolution.
SIZES: dict[str, dict[str, Any]] = {
    "halonet_va_nano": {
        "embed_dims": (48, 96, 192),
        "depths": (2, 3, 2),
        "num_heads": (3, 6, 12),
        "block_size": 4,
        "halo_size": 1,
        "bottleneck_ratio": 1.5,
        "stem_dim": 48,
        "stem_stride": 2,
    },
    "halonet_va_h0": _size(8, 3, 1, 0.5, 7),
    "halonet_va_h1": _size(8, 3, 1, 1, 10),
    "halonet_va_h2": _size(8, 3, 1, 1.25, 11),
    "halonet_va_h3": _size(10, 3, 1, 1.5, 12, 1024),
    "halonet_va_h4": _size(12, 2, 1, 3, 12, 1280),
    "halonet_va_h5": _size(14, 2, 2.5, 2, 23, 1536),
    "halonet_va_h6": _size(8, 4, 3, 2.75, 24, 1536),
    "halonet_va_h7": _size(10, 3, 4, 3.5, 26, 2048),
}


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        input_size=(3, size, size),
        pool_size=(-(-size // 32), -(-size // 32)),
        paper_ids="arXiv:2103.12731",
        first_conv="stem.0.conv",
        classifier="head.fc",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "halonet_va_nano.glyphs": glyphs_cfg(
            "halonet_va_nano",
            pool_size=(4, 4),
            first_conv="stem.0.conv",
            classifier="head.fc",
            paper_ids="arXiv:2103.12731",
        ),
        "halonet_va_h0.untrained": _cfg(256),
        "halonet_va_h1.untrained": _cfg(256),
        "halonet_va_h2.untrained": _cfg(256),
        "halonet_va_h3.untrained": _cfg(320),
        "halonet_va_h4.untrained": _cfg(384),
        "halonet_va_h5.untrained": _cfg(448),
        "halonet_va_h6.untrained": _cfg(512),
        "halonet_va_h7.untrained": _cfg(600),
    }
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: HaloNet) -> dict[str, Tensor]:
    """Weights under our keys.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = unwrap(checkpoint)
    check_fit(state_dict, model, adapted=("head.fc.", "stem.0.conv."))
    return state_dict


def _create(name: str, pretrained: bool, **kwargs: Any) -> HaloNet:
    return build(
        HaloNet,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": tuple(range(len(SIZES[name]["depths"]))), "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
