"""Vision Transformer with a choice of attention.

An Image is Worth 16x16 Words (Dosovitskiy et al.), arXiv:2010.11929; sizes tiny and small from arXiv:2106.10270.
Parameter names are those of timm's ViT, so its published weights load as they are.

Shapes: B batch, H x W grid of patches, P prefix tokens (class token, then registers), N = P + H * W, C channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    PatchDropout,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    resample_patch_embed,
    trunc_normal_,
)
from timm.models import PretrainedCfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import get_pretrained_grid_size, update_model_args, update_model_input_size
from torch import Tensor, nn

from vizattn.attention import attention_class
from vizattn.errors import VizattnError, unknown
from vizattn.layers import LayerNorm, TransformerBlock

from ._build import build, glyphs_cfg
from ._checkpoint import check_fit, unwrap
from ._registry import register_sizes

__all__ = ["VisionTransformer"]

POOLS = ("", "avg", "avgmax", "max", "token")


class VisionTransformer(nn.Module):
    """Isotropic Vision Transformer. Takes images of any size.

    The position table is resized to the grid of each input; at the native size it is used as it is. A height or width
    that the patch does not divide is filled up with zeros (the mean of a normalised image) at the bottom and right, so
    the last row or column of patches sees part image, part zeros; no patch lies wholly in the padding, and no token
    is masked.

    Args:
        img_size: Native height and width: the grid of the position table.
        patch_size: Height and width of a patch.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: How the tokens become one vector: "token", "avg", "max", "avgmax", or "" to keep them all.
        embed_dim: Channels C.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP, in units of C.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries and keys are normalised.
        init_values: Initial layer scale, arXiv:2103.17239; None for no layer scale.
        class_token: Whether there is a class token.
        no_embed_class: Whether the position table leaves out the prefix tokens.
        reg_tokens: Number of register tokens, arXiv:2309.16588.
        pre_norm: Whether tokens are normalised before the first block.
        fc_norm: Whether the final norm comes after pooling; None: for "avg", "max" and "avgmax".
        attn: Name of the attention, see `vizattn.attention.ATTENTION`, or a name for each block.
        attn_kwargs: Options of attentions by name, such as ``{"agent": {"num_agents": 81}}``.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position table is added.
        patch_drop_rate: Share of patches left out in training, arXiv:2212.00794.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: An unknown attention or pooling, options for an attention that is not used, a list of attentions
            of another length than the blocks, patch dropout with another attention than softmax, or token pooling
            without a class token.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        attn: str | Sequence[str] = "softmax",
        attn_kwargs: dict[str, dict[str, Any]] | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
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
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.num_embedded_prefix = 0 if no_embed_class else self.num_prefix_tokens  # those with a row in pos_embed
        self.grad_checkpointing = False
        self.global_pool = self._checked_pool(global_pool)

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,  # type: ignore[arg-type]  # a pair works as well
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,  # a norm right after it would cancel most of it
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        positions = self.patch_embed.num_patches + self.num_embedded_prefix
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = (
            PatchDropout(patch_drop_rate, num_prefix_tokens=self.num_prefix_tokens)
            if patch_drop_rate > 0
            else nn.Identity()
        )
        self.norm_pre = LayerNorm(embed_dim, **dd) if pre_norm else nn.Identity()

        names = [attn] * depth if isinstance(attn, str) else list(attn)
        if len(names) != depth:
            raise VizattnError(f"attn names {len(names)} attentions for {depth} blocks: {', '.join(names)}.")
        if patch_drop_rate > 0 and set(names) != {"softmax"}:
            raise VizattnError(f"patch_drop_rate needs attn='softmax', which works without the grid, not {attn!r}.")
        for name in attn_kwargs or {}:
            if name not in names:
                raise unknown("attention of this model in attn_kwargs:", name, sorted(set(names)))
        self.blocks = nn.Sequential(
            *[
                TransformerBlock(
                    embed_dim,
                    attention_class(name)(
                        embed_dim,
                        num_heads,
                        grid_size=self.patch_embed.grid_size,
                        num_prefix_tokens=self.num_prefix_tokens,
                        qkv_bias=qkv_bias,
                        qk_norm=qk_norm,
                        attn_drop=attn_drop_rate,
                        proj_drop=proj_drop_rate,
                        norm_layer=LayerNorm,
                        **(attn_kwargs or {}).get(name, {}),
                        **dd,
                    ),
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,  # type: ignore[arg-type]  # floats for one depth
                    **dd,
                )
                for name, drop_path in zip(names, calculate_drop_path_rates(drop_path_rate, depth))
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]

        norm_after_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pool else LayerNorm(embed_dim, **dd)
        self.fc_norm = LayerNorm(embed_dim, **dd) if norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(reset=False)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in POOLS:
            raise VizattnError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, not {global_pool!r}.")
        if global_pool == "token" and not self.has_class_token:
            raise VizattnError("global_pool='token' needs the class token; use class_token=True or global_pool='avg'.")
        return global_pool

    @torch.jit.ignore
    def init_weights(self, reset: bool = True) -> None:
        """Draw all parameters anew (as after `to_empty`); without `reset`, keep what the modules drew themselves."""
        trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
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
        return {"pos_embed", "cls_token", "reg_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters from stem to head, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head (0 classes: none), keeping type, device, mode, and the pooling unless one is given.

        Raises:
            VizattnError: An unknown pooling, or token pooling without a class token.
        """
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
            # The pooling no longer tells where the norm is, so say it for whoever rebuilds this model.
            update_model_args(self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Make another image or patch size the native one: position table and patch kernel are resized for good."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.patch_embed.grid_size != old_grid:
            table = resample_abs_pos_embed(
                self.pos_embed.detach(),
                new_size=list(self.patch_embed.grid_size),
                old_size=list(old_grid),
                num_prefix_tokens=self.num_embedded_prefix,
            )
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
            for block in self.blocks:
                if hasattr(block.attn, "set_grid_size"):  # an attention with tables of the grid's size
                    block.attn.set_grid_size(self.patch_embed.grid_size)  # type: ignore[operator]
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions, resized to this grid, and put the prefix tokens in front: (B, H, W, C) -> (B, N, C)."""
        B, H, W, _ = x.shape
        native = self.patch_embed.grid_size
        table = resample_abs_pos_embed(
            self.pos_embed,
            new_size=[H, W],
            old_size=[native[0], native[1]],
            num_prefix_tokens=self.num_embedded_prefix,
        )
        tokens = []
        if self.cls_token is not None:
            tokens.append(self.cls_token.expand(B, -1, -1))
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(B, -1, -1))
        x = x.flatten(1, 2)
        if self.no_embed_class:
            x = torch.cat(tokens + [x + table], dim=1)  # noqa: RUF005 (TorchScript)
        else:
            x = torch.cat(tokens + [x], dim=1) + table  # noqa: RUF005 (TorchScript)
        return self.pos_drop(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks.

        Args:
            x: Images (B, in_chans, height, width).
            indices: Blocks to take: a list (negative counts from the end), the last n, or None for all.
            return_prefix_tokens: Give pairs (patch features, prefix tokens).
            norm: Apply the final norm to each.
            stop_early: Do not run blocks after the last one taken.
            output_fmt: "NCHW" for maps (B, C, H, W) or "NLC" for tokens (B, H * W, C).
            intermediates_only: Leave out the final features.
            output_dict: Give a dictionary: image_intermediates, and as asked for image_intermediates_prefix and
                image_features.

        Returns:
            (final features (B, N, C), list of intermediates), or only the list, or the dictionary.

        Raises:
            VizattnError: An unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise VizattnError(f"output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}.")
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        blocks = self.blocks[: last + 1] if stop_early else self.blocks

        x = self.patch_embed(x)
        B, H, W, _ = x.shape
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        taken = []
        for i, block in enumerate(blocks):
            x = checkpoint(block, x, (H, W), use_reentrant=False) if self.grad_checkpointing else block(x, (H, W))
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        features = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            features = [y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for y in features]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0

        if output_dict:
            result: dict[str, Any] = {"image_intermediates": features}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates = list(zip(features, prefix)) if with_prefix else features
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks, and as asked norm and head, that the chosen intermediates do not need; give the indices."""
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> tokens (B, N, C)."""
        x = self.patch_embed(x)
        grid_size = (x.shape[1], x.shape[2])
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid_size, use_reentrant=False)
            else:
                x = block(x, grid_size)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, N, C) -> (B, C), or unchanged for pooling ""."""
        return global_pool_nlc(
            x,
            pool_type=self.global_pool if pool_type is None else pool_type,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) -> logits (B, num_classes), or the pooled features (B, C) that the head would get."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Width, depth and heads: table 1 of arXiv:2010.11929 (base, large), table 2 of arXiv:2106.10270 (tiny, small).
SIZES: dict[str, dict[str, Any]] = {
    "vit_va_nano_patch4_32": {"embed_dim": 96, "depth": 6, "num_heads": 3, "img_size": 32, "patch_size": 4},
    "vit_va_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_va_small_patch16_224": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_va_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_va_large_patch16_224": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2010.11929",
        **kwargs,
    }


AUGREG = {"paper_ids": "arXiv:2106.10270", "origin_url": "https://github.com/google-research/vision_transformer"}
ORIG = {"paper_ids": "arXiv:2010.11929", "origin_url": "https://github.com/google-research/vision_transformer"}
SAM = {"paper_ids": "arXiv:2106.01548", "origin_url": "https://github.com/google-research/vision_transformer"}
IMAGENET_STATISTICS = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
DINO = {"paper_ids": "arXiv:2104.14294", "origin_url": "https://github.com/facebookresearch/dino", "num_classes": 0}
MAE = {"paper_ids": "arXiv:2111.06377", "origin_url": "https://github.com/facebookresearch/mae", "num_classes": 0}

# timm/vit_SIZE.TAG on the hub serves our vit_va_SIZE.TAG; the first tag of a size is its default.
HUB_WEIGHTS: dict[str, dict[str, Any]] = {
    "tiny_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "tiny_patch16_224.augreg_in21k": AUGREG | {"num_classes": 21843},
    "small_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "small_patch16_224.augreg_in1k": AUGREG,
    "small_patch16_224.augreg_in21k": AUGREG | {"num_classes": 21843},
    "small_patch16_224.dino": DINO | IMAGENET_STATISTICS,
    "base_patch16_224.augreg2_in21k_ft_in1k": AUGREG,
    "base_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "base_patch16_224.augreg_in1k": AUGREG,
    "base_patch16_224.augreg_in21k": AUGREG | {"num_classes": 21843},
    "base_patch16_224.orig_in21k_ft_in1k": ORIG,
    "base_patch16_224.orig_in21k": ORIG | {"num_classes": 0},
    "base_patch16_224.sam_in1k": SAM,
    "base_patch16_224.dino": DINO | IMAGENET_STATISTICS,
    "base_patch16_224.mae": MAE | IMAGENET_STATISTICS | {"license": "cc-by-nc-4.0"},
    "large_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "large_patch16_224.augreg_in21k": AUGREG | {"num_classes": 21843},
    "large_patch16_224.orig_in21k": ORIG | {"num_classes": 0},
    "large_patch16_224.mae": MAE | IMAGENET_STATISTICS | {"license": "cc-by-nc-4.0"},
}

default_cfgs = generate_default_cfgs(
    {
        "vit_va_nano_patch4_32.glyphs": _cfg(**glyphs_cfg("vit_va_nano_patch4_32", pool_size=None)),
        **{f"vit_va_{key}": _cfg(hf_hub_id=f"timm/vit_{key}", **fields) for key, fields in HUB_WEIGHTS.items()},
    }
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Fit published weights to `model`: its patch size and its grid of positions; timm then adapts channels and head.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = unwrap(checkpoint)
    kernel, table = state_dict.get("patch_embed.proj.weight"), state_dict.get("pos_embed")
    if table is not None and table.ndim == 3:
        prefix = model.num_embedded_prefix
        patches = table.shape[1] - prefix
        grid = model.patch_embed.grid_size
        side = math.isqrt(max(patches, 0))
        square_or_same = grid if side**2 != patches == grid[0] * grid[1] else (side, side)
        old_grid = get_pretrained_grid_size(model, kernel, patches) or square_or_same
        if old_grid[0] * old_grid[1] != patches:
            raise VizattnError(
                f"The position table of the weights has {table.shape[1]} rows, which is not {prefix} prefix tokens "
                "and a square grid: class token, registers or input size differ from this model's."
            )
        state_dict["pos_embed"] = resample_abs_pos_embed(
            table,
            new_size=list(model.patch_embed.grid_size),
            old_size=list(old_grid),
            num_prefix_tokens=prefix,
        )
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-2:] != model.patch_embed.patch_size:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(model.patch_embed.patch_size))
    check_fit(state_dict, model, adapted=("head.", "patch_embed.proj.weight"))
    return state_dict


def released_layout(state_dict: dict[str, Tensor], model: VisionTransformer, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as timm's file on the hub, which has our keys."""
    return dict(state_dict)


def _create(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    return build(
        VisionTransformer,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": 3, "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
