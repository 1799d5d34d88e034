"""Hierarchical Side-Tuning, arXiv:2310.05393: a small pyramid beside a plain ViT reads every block.

Shapes: B batch, N patch tokens, D their width, M tokens of a side map, C width of a side stage, h its heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy
from vizattn.adapters.base import register
from vizattn.adapters.edits import Edits
from vizattn.adapters.head import classify, normalise, own_head
from vizattn.adapters.tokens import insert_tokens
from vizattn.errors import VizattnError

__all__ = ["HST", "SideBlock"]


@register("hst")
@dataclass(frozen=True)
class HST:
    """Hierarchical Side-Tuning: a small side pyramid reads a meta-token and the patch map of every block."""

    widths: tuple[int, ...] = (32, 48, 64, 72)
    """Channels of the four side stages; (64, 128, 256, 384) for dense prediction."""
    num_heads: tuple[int, ...] = (2, 4, 8, 12)
    """Heads of the side blocks' attention, a number a stage."""
    mlp_ratio: float = 4.0
    """Width of the side blocks' MLP in units of theirs."""
    drop_path: float = 0.0
    """Stochastic depth of the last side block, rising linearly from zero."""

    needs_anatomy: ClassVar[bool] = True
    mergeable: ClassVar[str] = "the side network is a second network"
    hierarchical: ClassVar[bool] = False
    extra_tokens: ClassVar[bool] = True
    composes_with: ClassVar[tuple[str, ...]] = ()
    cache_level: ClassVar[None] = None
    trains_backbone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("widths", "num_heads"):  # lists come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0.0 <= self.drop_path < 1.0 or self.mlp_ratio <= 0:
            raise VizattnError(
                f"hst: drop_path must lie in [0, 1) and mlp_ratio be positive, got {self.drop_path}, {self.mlp_ratio}."
            )
        if min(self.widths + self.num_heads, default=0) < 1:
            raise VizattnError(f"hst: widths and num_heads must be positive, got {self.widths} and {self.num_heads}.")
        if len(self.widths) != len(self.num_heads) or any(w % h for w, h in zip(self.widths, self.num_heads)):
            raise VizattnError(
                f"hst: each width must be a multiple of its num_heads, got widths {self.widths} "
                f"and num_heads {self.num_heads}."
            )

    def attach(self, model: nn.Module, anatomy: Anatomy, edits: Edits) -> nn.Module:
        """Give every block a meta-token, train the blocks' norms, and hang the side network on.

        From then on `forward_features` returns the last side map and `forward_intermediates` the side pyramid.

        Raises:
            VizattnError: fewer blocks than side stages.
        """
        if len(anatomy.blocks) < len(self.widths):
            raise VizattnError(f"hst: {len(self.widths)} side stages need as many blocks, got {len(anatomy.blocks)}.")
        side = SideNetwork(anatomy, model.in_chans if hasattr(model, "in_chans") else 3, self)  # type: ignore[arg-type]
        insert_tokens(anatomy, edits, side, 1)
        for b in anatomy.blocks:
            for norm in b.norms:
                norm.requires_grad_(True)
        own_head(model, side.head_features, edits)
        edits.set(model, "feature_info", side.feature_info())
        for attribute in ("num_features", "head_hidden_size"):
            edits.set(model, attribute, side.head_features)
        return side


class TwoKeyAttention(nn.Module):
    """Multi-head attention of M queries to two keys, (B, M, C) and (B, 2, C) -> (B, M, C).

    A softmax over two scores is a sigmoid of their difference, so the output is a line between the two values. Both
    projections of the queries' side then act on h numbers a token instead of C: O(M*C*h) instead of O(M*C^2), and the
    same function.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, pair: Tensor) -> Tensor:
        k = self.k(pair).unflatten(-1, (self.num_heads, -1))  # B, 2, h, C/h
        v = self.v(pair).unflatten(-1, (self.num_heads, -1))
        k_step, v_step = (k[:, 0] - k[:, 1]) * self.scale, v[:, 0] - v[:, 1]  # B, h, C/h
        w_q = self.q.weight.unflatten(0, (self.num_heads, -1))  # h, C/h, C
        w_o = self.proj.weight.unflatten(1, (self.num_heads, -1))  # C, h, C/h
        to_score = torch.einsum("bhd,hdc->bch", k_step, w_q)
        offset = torch.einsum("bhd,hd->bh", k_step, self.q.bias.unflatten(0, (self.num_heads, -1)))
        share = torch.baddbmm(offset[:, None], x, to_score).sigmoid()  # B, M, h
        from_share = torch.einsum("bhd,chd->bhc", v_step, w_o)
        return torch.baddbmm(self.proj(v[:, 1].flatten(1))[:, None], share, from_share)


class SideBlock(nn.Module):
    """Cross-attention to what the backbone's block says in two tokens, its patch map added, then an MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TwoKeyAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, meta: Tensor, patches: Tensor) -> Tensor:
        """Side tokens (B, M, C), the block's meta-token (B, 1, C) and patch map (B, M, C) -> (B, M, C)."""
        pair = torch.cat([meta, patches.mean(dim=1, keepdim=True)], dim=1)
        x = x + self.drop_path(self.attn(self.norm1(x), pair)) + patches
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SideStage(nn.Module):
    """Downsampling, the bridge from the backbone, and one side block for each of its blocks."""

    def __init__(
        self,
        down: nn.Module,
        stride: int,
        embed_dim: int,
        dim: int,
        num_heads: int,
        drops: list[float],
        ratio: float,
    ) -> None:
        super().__init__()
        self.down, self.stride = down, stride
        self.down_norm = nn.LayerNorm(dim, eps=1e-5)
        self.bridge = nn.Linear(embed_dim, dim)
        self.meta_norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-5) for _ in drops)
        self.blocks = nn.ModuleList(SideBlock(dim, num_heads, ratio, drop) for drop in drops)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self, x: Tensor, read: list[tuple[Tensor, Tensor]], grid: tuple[int, int], patch: tuple[int, int]
    ) -> Tensor:
        """A map (B, C', H', W') and the bridged (meta-token, patches) of each block -> the map (B, C, H, W).

        `grid` is the height and width of the patch map, `patch` that of a patch in pixels of the image.
        """
        x = self.down(x)
        size = x.shape[-2:]
        x = self.down_norm(x.flatten(2).transpose(1, 2))
        for block, norm, (meta, patches) in zip(self.blocks, self.meta_norms, read, strict=True):
            maps = patches.transpose(1, 2).unflatten(2, grid)
            maps = _resize(maps, (patch[0] / self.stride, patch[1] / self.stride), (size[0], size[1]))
            x = block(x, norm(meta), maps.flatten(2).transpose(1, 2))
        return self.norm(x).transpose(1, 2).unflatten(2, size)


class SideNetwork(nn.Module):
    """The meta-tokens, and the pyramid (strides 4, 8, 16, 32) that reads the backbone's blocks."""

    read: list[tuple[Tensor, Tensor] | None] | None = None

    def __init__(self, anatomy: Anatomy, in_chans: int, options: HST) -> None:
        super().__init__()
        depth, stages, widths = len(anatomy.blocks), len(options.widths), options.widths
        per_stage = [depth // stages + (i < depth % stages) for i in range(stages)]
        self.stage_of = [s for s, count in enumerate(per_stage) for _ in range(count)]
        self.prefix = anatomy.num_prefix_tokens
        self.head_features = widths[-1]
        self.meta_tokens = nn.ParameterList(nn.Parameter(torch.empty(1, 1, anatomy.embed_dim)) for _ in range(depth))
        drops = [options.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.stages = nn.ModuleList()
        for i, (width, heads) in enumerate(zip(widths, options.num_heads)):
            down: nn.Module = nn.Conv2d(widths[i - 1], width, 3, 2, 1)
            if i == 0:
                stem = (nn.Conv2d(in_chans, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                down = nn.Sequential(*stem, nn.Conv2d(width, width, 2, 2))
            own = [drop for drop, stage in zip(drops, self.stage_of) if stage == i]
            stage = SideStage(down, 4 * 2**i, anatomy.embed_dim, width, heads, own, options.mlp_ratio)
            self.stages.append(stage)
        self.norm = nn.BatchNorm1d(widths[-1], affine=False, eps=1e-6)
        self.apply(_init_weights)
        for token in self.meta_tokens:
            nn.init.xavier_uniform_(token)

    def __getstate__(self) -> dict[str, Any]:  # tensors of a running forward are not part of a copy
        return {k: v for k, v in self.__dict__.items() if k != "read"}

    def feature_info(self) -> list[dict[str, Any]]:
        """timm's description of the pyramid, whose maps end in a LayerNorm."""
        rows: list[dict[str, Any]] = []
        stage: Any
        for i, stage in enumerate(self.stages):
            name, width = f"adapters.hst.stages.{i}", stage.norm.normalized_shape[0]
            rows.append({"num_chs": width, "reduction": stage.stride, "module": name, "normed": True})
        return rows

    def tokens_before(self, index: int, x: Tensor) -> Tensor:
        """See `TokenSource`."""
        return self.meta_tokens[index].expand(x.shape[0], -1, -1)

    def tokens_after(self, index: int, tokens: Tensor, x: Tensor) -> None:
        """See `TokenSource`. What is kept is already projected to the width of the side stage."""
        bridge: Any = self.stages[self.stage_of[index]].bridge
        read = bridge(tokens), bridge(x[:, self.prefix :])
        if self.read is not None:  # gradient checkpointing calls again, after the forward
            self.read[index] = read

    def pyramid(self, model: Any, run: Callable[..., Any], image: Tensor, **kwargs: Any) -> list[Tensor]:
        """The side maps (B, C, H, W) of images (B, channels, height, width).

        Their strides are 4, 8, 16 and 32 whatever the size of a patch, with H = ceil(height / stride).
        """
        self.read = [None] * len(self.stage_of)
        run(image, **kwargs)
        read, self.read = self.read, None
        grid = model.patch_embed.dynamic_feat_size(image.shape[-2:])
        down, right = (-side % 4 for side in image.shape[-2:])
        maps, x = [], F.pad(image, (0, right, 0, down)) if down or right else image
        for i, stage in enumerate(self.stages):
            own = [r for r, s in zip(read, self.stage_of) if s == i]
            x = stage(x, own, tuple(grid), model.patch_embed.patch_size)
            maps.append(x)
        return maps

    def forward_features(self, model: Any, run: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        """Images to the last side map (B, C, H/32, W/32)."""
        return self.pyramid(model, run, x, **kwargs)[-1]

    def forward_head(self, model: Any, run: Callable[..., Tensor], x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last side map to logits."""
        x = normalise(self.norm, x.mean(dim=(2, 3)))
        return x if pre_logits else classify(model, x)

    def forward_intermediates(
        self,
        model: Any,
        run: Callable[..., Any],
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The side pyramid in timm's form; its levels are normed already."""
        if output_fmt != "NCHW":
            raise VizattnError(f"hst: the side pyramid comes as NCHW only, got output_fmt={output_fmt!r}.")
        take, _ = feature_take_indices(len(self.stages), indices)
        maps = self.pyramid(model, run, x, indices=1)
        chosen = [m for i, m in enumerate(maps) if i in take]
        if output_dict:
            return {"image_intermediates": chosen} | ({} if intermediates_only else {"image_features": maps[-1]})
        return chosen if intermediates_only else (maps[-1], chosen)

    def describe_maps(self, source: Any, edits: Edits) -> None:
        """Make timm's `features_only` model give the four side maps, and say so."""
        indices = tuple(range(len(self.stages)))
        edits.set(source, "out_indices", indices)
        edits.set(source, "feature_info", FeatureInfo(self.feature_info(), indices))


def _resize(x: Tensor, factor: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) stretched bilinearly by `factor` and cut to `size`, the top left corner in its place.

    Sizes alone would shift what lies towards the other corner where an image is no multiple of the strides.
    """
    if factor != (1, 1):
        down, right = (math.ceil(n / f) - side for n, f, side in zip(size, factor, x.shape[-2:]))
        if down > 0 or right > 0:
            x = F.pad(x, (0, max(right, 0), 0, max(down, 0)), mode="replicate")
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return x[..., : size[0], : size[1]] if tuple(x.shape[-2:]) != size else x


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
