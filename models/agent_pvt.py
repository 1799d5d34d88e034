"""PVT with agent attention: a pyramid whose tokens see the whole map at linear cost, without reducing the keys.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., ECCV 2024), arXiv:2312.08874,
on the layout of the Pyramid Vision Transformer, arXiv:2102.12122. The attention is `vizattn.attention.AgentAttention`.

Shapes: B batch, H x W tokens of a map, C channels. Maps are (B, C, H, W) between the stages, tokens (B, N, C) inside.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import PretrainedCfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vizattn.attention.agent import AgentAttention, resize_agent_tables
from vizattn.errors import VizattnError
from vizattn.layers import TransformerBlock

from ._build import build, imagenet_cfg
from ._checkpoint import check_fit, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["AgentPVT"]


class AgentPVTStage(nn.Module):
    """Patches of the map before become tokens, get positions, and pass the blocks.

    Args:
        in_chs: Channels of the map before.
        dim: Channels C.
        grid_size: Native map (H, W).
        patch_size: Height and width of a patch; a map that it does not divide is filled up with zeros.
        blocks: The blocks.
        pos_drop: Dropout after the position table is added.
    """

    def __init__(
        self,
        in_chs: int,
        dim: int,
        grid_size: tuple[int, int],
        patch_size: int,
        blocks: list[nn.Module],
        pos_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size = grid_size
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chs, dim, nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True, **dd
        )
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        trunc_normal_(self.pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Make another map the native one: tables of positions are resized for good."""
        old, self.grid_size = self.grid_size, grid_size
        table = resample_abs_pos_embed(self.pos_embed.detach(), list(grid_size), list(old), num_prefix_tokens=0)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        for block in self.blocks:
            block.attn.set_grid_size(grid_size)  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H_in, W_in) -> (B, C, H, W), channels last in memory."""
        x = self.patch_embed(x)
        B, H, W, C = x.shape
        native = [self.grid_size[0], self.grid_size[1]]
        x = x.flatten(1, 2) + resample_abs_pos_embed(self.pos_embed, [H, W], native, num_prefix_tokens=0)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, (H, W), use_reentrant=False)
            else:
                x = block(x, (H, W))
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


def _grids(img_size: tuple[int, int], patches: Sequence[int]) -> list[tuple[int, int]]:
    """The maps that an image gives, when each stage cuts the map before into patches."""
    H, W = img_size
    grids = []
    for patch in patches:
        H, W = -(-H // patch), -(-W // patch)
        grids.append((H, W))
    return grids


class AgentPVT(nn.Module):
    """Pyramid of four stages (or fewer) of agent attention over the whole map. Takes images of any size.

    Args:
        img_size: Native height and width: the size of the position tables.
        patch_size: Height and width of a patch of the image; later stages halve the map.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" to keep the map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden channels of the MLPs of each stage, in units of C.
        num_agents: Agents of each stage, square numbers.
        qkv_bias: Whether the query, key and value projection has a bias.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position tables are added.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Lists of different lengths.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        lengths = [len(values) for values in (embed_dims, depths, num_heads, mlp_ratios, num_agents)]
        if len(set(lengths)) > 1:
            raise VizattnError(
                "embed_dims, depths, num_heads, mlp_ratios and num_agents need an entry for each stage, not "
                f"{', '.join(map(str, lengths))}."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        patches = [patch_size] + [2] * (len(depths) - 1)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        self.feature_info = []
        in_chs = in_chans
        for i, (dim, grid_size) in enumerate(zip(embed_dims, _grids(to_2tuple(img_size), patches))):
            blocks: list[nn.Module] = []
            for drop_path in drop_paths[i]:
                attn = AgentAttention(
                    dim,
                    num_heads[i],
                    grid_size,
                    qkv_bias=qkv_bias,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    num_agents=num_agents[i],
                    **dd,
                )
                blocks.append(
                    TransformerBlock(
                        dim, attn, mlp_ratio=mlp_ratios[i], proj_drop=proj_drop_rate, drop_path=drop_path, **dd
                    )
                )
            stages.append(AgentPVTStage(in_chs, dim, grid_size, patches[i], blocks, pos_drop_rate, **dd))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": patch_size * 2**i})
            in_chs = dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters an optimizer should not decay, besides vectors."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "_bias"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters from stem to head, for layer-wise learning rates."""
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.(?:patch_embed|pos_embed)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
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

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another image size the native one: tables of positions are resized for good."""
        patches: Any = [stage.patch_size for stage in self.stages]
        for stage, grid_size in zip(self.stages, _grids(to_2tuple(img_size), patches)):
            stage.set_grid_size(grid_size)  # type: ignore[operator]
        update_model_input_size(self, img_size)

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
            x, nn.Identity(), self.stages, self.norm, indices, norm, stop_early, output_fmt, intermediates_only
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one taken, and as asked for the head; there is no final norm."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, C, H, W)."""
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Appendix of arXiv:2312.08874; widths, heads and MLPs are PVT's.
SIZES: dict[str, dict[str, Any]] = {
    "agent_pvt_tiny": {"depths": (2, 2, 2, 2)},
    "agent_pvt_small": {"depths": (3, 4, 6, 3)},
    "agent_pvt_medium": {"depths": (3, 4, 18, 3)},
    "agent_pvt_large": {"depths": (3, 8, 27, 3)},
}


def _cfg(file_id: str) -> dict[str, Any]:
    return imagenet_cfg(
        url=f"https://cloud.tsinghua.edu.cn/f/{file_id}/?dl=1",
        first_conv="stages.0.patch_embed.proj",
        classifier="head.fc",
        license="none stated",
        paper_ids="arXiv:2312.08874",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
        crop_pct=0.875,
    )


default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny.in1k": _cfg("13fdf0e0a7c5498c934f"),
        "agent_pvt_small.in1k": _cfg("36b8be9a8863456685a3"),
        "agent_pvt_medium.in1k": _cfg("4d00ecacf18b45f9b88c"),
        "agent_pvt_large.in1k": _cfg("040cfe0cfbbe4762ad09"),
    }
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: AgentPVT) -> dict[str, Tensor]:
    """Released weights, or ours, under our keys, with tables of positions in the sizes of `model`.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = unwrap(checkpoint)
    for key in list(state_dict):  # the release projects queries apart from keys and values
        other = key.replace(".attn.q.", ".attn.kv.")
        if other != key and other in state_dict:
            state_dict[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state_dict.pop(key), state_dict.pop(other)])

    renamed = {}
    for key, value in state_dict.items():
        counted = re.match(r"(pos_embed|patch_embed|block)(\d+)(.*)", key)  # the release counts stages from one
        if counted:
            part, stage, rest = counted.groups()
            key = f"stages.{int(stage) - 1}.{'blocks' if part == 'block' else part}{rest}"
        renamed[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)] = value

    for i, stage in enumerate(model.stages):
        grid_size: Any = stage.grid_size
        table, tall, wide = (
            renamed.get(f"stages.{i}.{key}") for key in ("pos_embed", "blocks.0.attn.ah_bias", "blocks.0.attn.aw_bias")
        )
        if table is not None and tall is not None and wide is not None:  # the biases tell the map that it is for
            renamed[f"stages.{i}.pos_embed"] = resample_abs_pos_embed(
                table, list(grid_size), [tall.shape[3], wide.shape[4]], num_prefix_tokens=0
            )
        for j in range(len(stage.blocks)):  # type: ignore[arg-type]
            resize_agent_tables(renamed, grid_size, f"stages.{i}.blocks.{j}.attn.")
    check_fit(renamed, model, adapted=("head.fc.", "stages.0.patch_embed.proj.weight"))
    return renamed


def released_layout(state_dict: dict[str, Tensor], model: AgentPVT, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the release."""
    released = {}
    for key, value in state_dict.items():
        key = re.sub(r"^head\.fc\.", "head.", key)
        key = re.sub(r"^stages\.(\d+)\.(pos_embed|patch_embed)", lambda m: f"{m[2]}{int(m[1]) + 1}", key)
        key = re.sub(r"^stages\.(\d+)\.blocks\.", lambda m: f"block{int(m[1]) + 1}.", key)
        if ".attn.qkv." in key:  # the release projects queries apart from keys and values
            dim = len(value) // 3
            released[key.replace(".qkv.", ".q.")] = value[:dim]
            released[key.replace(".qkv.", ".kv.")] = value[dim:]
        else:
            released[key] = value
    return {"model": released}


def _create(name: str, pretrained: bool, **kwargs: Any) -> AgentPVT:
    return build(
        AgentPVT,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
