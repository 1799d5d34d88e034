"""Neighborhood attention transformers: NAT, and with dilation DiNAT.

Neighborhood Attention Transformer (Hassani et al.), arXiv:2204.07143; Dilated Neighborhood Attention Transformer
(Hassani, Shi), arXiv:2209.15001; DiNAT_s has the hierarchy of Swin, arXiv:2103.14030. Stride and causal axes:
arXiv:2504.16922.

Shapes: B batch, H x W map of a stage, C channels of a stage. Maps are (B, C, H, W) outside of the stages, stored
channels last, so that they are tokens (B, H * W, C) without a copy.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import PretrainedCfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention import NeighborhoodAttention
from vizattn.errors import VizattnError
from vizattn.layers import TransformerBlock

from ._build import build, glyphs_cfg, imagenet_cfg
from ._checkpoint import Renames, check_fit, rename, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["NeighborhoodTransformer"]

EPS = 1e-5
MapNorm = partial(LayerNorm2d, eps=EPS)


class ConvStem(nn.Module):
    """Two overlapping convolutions and a norm: (B, in_chans, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_chans: int, dim: int, stride: int = 4, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride // 2, 1, **dd),
        )
        self.norm = MapNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images to a map of tokens."""
        return self.norm(self.proj(x))


class PatchStem(nn.Module):
    """Patches and a norm: (B, in_chans, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_chans: int, dim: int, stride: int = 4, **dd: Any) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, dim, stride, stride, **dd)
        self.norm = MapNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images, filled up with zeros at the bottom and right, to a map of tokens."""
        H, W = x.shape[-2:]
        return self.norm(self.proj(F.pad(x, (0, -W % self.stride, 0, -H % self.stride))))


class ConvDownsample(nn.Module):
    """(B, C, H, W) -> (B, 2 * C, ceil(H / 2), ceil(W / 2)), each from 3 x 3."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd)
        self.norm = MapNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.norm(self.reduction(x))


class PatchMerging(nn.Module):
    """(B, C, H, W) -> (B, 2 * C, ceil(H / 2), ceil(W / 2)), each from 2 x 2, arXiv:2103.14030."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map, odd ones filled up with zeros at the bottom and right."""
        B, C, H, W = x.shape
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, W % 2, 0, H % 2))
        x = x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)  # down before right
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Halve the map (but in the first stage), then blocks: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """All blocks on one map."""
        x = self.downsample(x)
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, (H, W), use_reentrant=False)
            else:
                x = block(x, (H, W))
        return x.view(B, H, W, C).permute(0, 3, 1, 2)


class NeighborhoodTransformer(nn.Module):
    """Pyramid of transformer blocks with neighborhood attention. Takes images of any size.

    Where a map is too small for a window, its dilation and then the window itself are lowered. The blocks of a stage
    alternate between dilation 1 and the stage's.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: How the last map becomes one vector: "avg", "max", "avgmax", "catavgmax", or "" to keep it.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        kernel_size: Keys of a window along each axis, of all stages or of each.
        dilations: Dilation of every other block, beginning with the second, of all stages or of each.
        stride: Queries in a row that share a window.
        is_causal: Whether the axes (height, width) have no keys behind the query.
        mlp_ratio: Hidden channels of the MLP, in units of C.
        init_values: Initial layer scale, arXiv:2103.17239; None for no layer scale.
        overlapping: Convolutions of 3 x 3 as stem and between the stages (NAT, DiNAT), or patches and patch merging as
            in Swin (DiNAT_s).
        stem_stride: Pixels a token of the first stage, along each axis: 4, or 2 for small images.
        qkv_bias: Whether the query, key and value projection has a bias.
        rel_pos_bias: Whether offsets have learnt biases.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Lists of different lengths, another `stem_stride`, or an option of the attention out of its range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: int | Sequence[int] = 1,
        stride: int = 1,
        is_causal: bool | tuple[bool, bool] = False,
        mlp_ratio: float = 3.0,
        init_values: float | None = None,
        overlapping: bool = True,
        stem_stride: int = 4,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kernels = [kernel_size] * len(depths) if isinstance(kernel_size, int) else list(kernel_size)
        far = [dilations] * len(depths) if isinstance(dilations, int) else list(dilations)
        for name, values in (("num_heads", num_heads), ("kernel_size", kernels), ("dilations", far)):
            if len(values) != len(depths):
                raise VizattnError(
                    f"{name} must have one entry for each of the {len(depths)} stages, not {len(values)}."
                )
        if stem_stride not in (2, 4):
            raise VizattnError(f"stem_stride must be 2 or 4, not {stem_stride}.")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        stem, downsample = (ConvStem, ConvDownsample) if overlapping else (PatchStem, PatchMerging)
        self.patch_embed = stem(in_chans, embed_dim, stem_stride, **dd)
        stages = []
        self.feature_info = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            dim = embed_dim * 2**i
            blocks = [
                TransformerBlock(
                    dim,
                    NeighborhoodAttention(
                        dim,
                        num_heads[i],
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=proj_drop_rate,
                        kernel_size=kernels[i],
                        dilation=far[i] if j % 2 else 1,
                        stride=stride,
                        is_causal=is_causal,
                        rel_pos_bias=rel_pos_bias,
                        **dd,
                    ),
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=rates[j],  # type: ignore[index]  # stagewise: a list of lists
                    norm_layer=partial(nn.LayerNorm, eps=EPS),
                    **dd,
                )
                for j in range(depths[i])
            ]
            stages.append(Stage(downsample(dim // 2, **dd) if i else nn.Identity(), blocks))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": stem_stride * 2**i})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dim
        self.norm: nn.Module = MapNorm(dim, **dd)
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights(reset=False)

    @torch.jit.ignore
    def init_weights(self, reset: bool = True) -> None:
        """Draw all parameters anew (as after `to_empty`); without `reset`, keep what the modules drew themselves."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters an optimizer should not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters from stem to head, for layer-wise learning rates."""
        return {
            "stem": r"^patch_embed",
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
        """Replace the head (0 classes: none), keeping type and device, and the pooling unless one is given."""
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
        """Final features (B, C, H, W) and maps after chosen stages, see `_pyramid.stage_intermediates`."""
        return stage_intermediates(
            x, self.patch_embed, self.stages, self.norm, indices, norm, stop_early, output_fmt, intermediates_only
        )

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages, and as asked norm and head, that the chosen intermediates do not need; give the indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:  # the norm has the width of the last stage
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> (B, C, H, W)."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes), or the pooled features (B, C) that the head would get."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


DEEP = {"depths": (3, 4, 18, 5)}
SWIN = {"overlapping": False, "mlp_ratio": 4.0}
DILATED = {"dilations": (8, 4, 2, 1)}

# Table 1 of arXiv:2204.07143; tables 2 and 3 of arXiv:2209.15001; layer scale as in the releases.
NAT: dict[str, dict[str, Any]] = {
    "mini": {},
    "tiny": DEEP,
    "small": DEEP | {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0},
    "base": DEEP | {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "init_values": 1e-5},
}
LARGE = DEEP | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}
SIZES: dict[str, dict[str, Any]] = {
    "nat_nano": {
        "embed_dim": 48,
        "depths": (2, 2, 1),
        "num_heads": (3, 6, 12),
        "kernel_size": 5,
        "mlp_ratio": 2.0,
        "stem_stride": 2,
    },
    **{f"nat_{size}": args for size, args in NAT.items()},
    "nat_small": NAT["small"] | {"init_values": 1e-5},
    **{f"dinat_{size}": args | DILATED for size, args in NAT.items()},
    "dinat_large": LARGE | DILATED,
    "dinat_large_384": LARGE | {"dilations": (13, 6, 3, 1)},
    "dinat_large_384_11x11": LARGE | {"dilations": (8, 4, 2, 1), "kernel_size": 11},
    **{
        f"dinat_s_{size}": SWIN
        | DILATED
        | {"embed_dim": 32 * h, "depths": depths, "num_heads": (h, 2 * h, 4 * h, 8 * h)}
        for size, h, depths in (
            ("tiny", 3, (2, 2, 6, 2)),
            ("small", 3, (2, 2, 18, 2)),
            ("base", 4, (2, 2, 18, 2)),
            ("large", 6, (2, 2, 18, 2)),
        )
    },
}

RELEASES = "https://shi-labs.com/projects"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **{"first_conv": "patch_embed.proj.0", "classifier": "head.fc", "license": "mit", "crop_pct": 0.875, **kwargs},
    )


def _dinat(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(url=f"{RELEASES}/dinat/checkpoints/{file}.pth", paper_ids="arXiv:2209.15001", **kwargs)


PATCHES = {"first_conv": "patch_embed.proj"}
NATIVE_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        "nat_nano.glyphs": glyphs_cfg(
            "nat_nano",
            pool_size=(4, 4),
            first_conv="patch_embed.proj.0",
            classifier="head.fc",
            paper_ids="arXiv:2204.07143",
        ),
        **{
            f"nat_{size}.in1k": _cfg(url=f"{RELEASES}/nat/checkpoints/CLS/nat_{size}.pth", paper_ids="arXiv:2204.07143")
            for size in NAT
        },
        **{f"dinat_{size}.in1k": _dinat(f"imagenet1k/dinat_{size}_in1k_224") for size in NAT},
        "dinat_large.in22k_ft_in1k": _dinat("imagenet1k/dinat_large_in22k_in1k_224"),
        "dinat_large_384.in22k_ft_in1k": _dinat("imagenet1k/dinat_large_in22k_in1k_384", **NATIVE_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _dinat("imagenet1k/dinat_large_in22k_in1k_384_11x11", **NATIVE_384),
        **{
            f"dinat_s_{size}.in1k": _dinat(f"imagenet1k/dinat_s_{size}_in1k_224", **PATCHES)
            for size in ("tiny", "small", "base")
        },
        "dinat_s_large.untrained": _cfg(paper_ids="arXiv:2209.15001", **PATCHES),
    }
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: NeighborhoodTransformer) -> dict[str, Tensor]:
    """Rename the released keys (`levels` of NAT and DiNAT, `layers` of DiNAT_s); timm then adapts channels and head.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = {}
    for key, value in unwrap(checkpoint).items():
        part, _, rest = key.partition(".")
        if part in ("levels", "layers"):
            index, _, rest = rest.partition(".")
            # The release halves the map at the end of a stage, we do at the beginning of the next.
            key = f"stages.{int(index) + rest.startswith('downsample.')}.{rest}"
            key = key.replace(".gamma1", ".ls1.gamma").replace(".gamma2", ".ls2.gamma")
        elif part == "head" and not rest.startswith("fc."):
            key = f"head.fc.{rest}"
        state_dict[key] = value
    first_conv = "patch_embed.proj.0.weight" if isinstance(model.patch_embed, ConvStem) else "patch_embed.proj.weight"
    check_fit(state_dict, model, adapted=("head.fc.", first_conv))
    return state_dict


def released_layout(
    state_dict: dict[str, Tensor], model: NeighborhoodTransformer, cfg: PretrainedCfg
) -> dict[str, Any]:
    """Our weights as in the release: a flat file, `levels` in NAT and DiNAT, `layers` in DiNAT_s."""
    levels = "levels" if isinstance(model.patch_embed, ConvStem) else "layers"
    renames: Renames = [
        (r"^stages\.(\d+)\.downsample\.", lambda m: f"{levels}.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", f"{levels}."),
        (r"\.ls([12])\.gamma$", r".gamma\1"),
        (r"^head\.fc\.", "head."),
    ]
    return {rename(key, renames): value for key, value in state_dict.items()}


def _create(name: str, pretrained: bool, **kwargs: Any) -> NeighborhoodTransformer:
    args = SIZES[name] | kwargs
    out_indices = tuple(range(len(args.get("depths", (3, 4, 6, 5)))))
    return build(
        NeighborhoodTransformer,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": out_indices, "flatten_sequential": True},
        **args,
    )


register_sizes(__name__, SIZES, _create)
