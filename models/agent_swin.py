"""Swin with agent attention in its early stages: they see the whole map at linear cost, the late ones keep windows.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., ECCV 2024), arXiv:2312.08874,
on the layout of the Swin Transformer, arXiv:2103.14030. The attentions are `AgentAttention` and `WindowAttention` of
`vizattn.attention`. The paper's agent blocks take windows of 56 x 56 tokens, which is the whole map of a 224 x 224
image; ours take the whole map at every size.

Shapes: B batch, H x W tokens of a map, C channels. Maps are (B, C, H, W) between the stages, tokens (B, N, C) inside.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    to_2tuple,
    trunc_normal_,
)
from timm.models import PretrainedCfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.agent import AgentAttention, resize_agent_tables
from vizattn.attention.window import WindowAttention
from vizattn.errors import VizattnError
from vizattn.layers import TransformerBlock

from ._build import build, imagenet_cfg
from ._checkpoint import Renames, check_fit, rename, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["AgentSwin"]


class PatchMerging(nn.Module):
    """Halve the map: the tokens of 2 x 2 patches side by side, normalised and projected. Zeros fill up an odd map.

    Args:
        in_chs: Channels of the map before.
        dim: Channels of the map.
    """

    def __init__(
        self,
        in_chs: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * in_chs, **dd)
        self.reduction = nn.Linear(4 * in_chs, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), channels last in memory."""
        x = x.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        B, H, W, C = x.shape
        # Channels by column of the patch, then row: the order of Swin's weights.
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class AgentSwinStage(nn.Module):
    """Halve the map (but in the first stage), then the blocks.

    Args:
        downsample: What comes before the blocks.
        blocks: The blocks, on tokens.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H_in, W_in) -> (B, C, H, W), channels last in memory."""
        x = self.downsample(x)
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, (H, W), use_reentrant=False)
            else:
                x = block(x, (H, W))
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


def _grids(img_size: tuple[int, int], patch_size: int, stages: int) -> list[tuple[int, int]]:
    """The maps that an image gives."""
    return [(-(-img_size[0] // r), -(-img_size[1] // r)) for r in (patch_size * 2**i for i in range(stages))]


class AgentSwin(nn.Module):
    """Pyramid of four stages (or fewer), whose blocks attend by agents or in windows. Takes images of any size.

    Args:
        img_size: Native height and width: the size of the agents' position tables.
        patch_size: Height and width of a patch of the image; later stages halve the map.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" to keep the map.
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        agent_blocks: How many blocks of each stage, from its first on, attend by agents. The others attend in windows,
            every other one (the second of a stage, the fourth, ...) in shifted windows.
        num_agents: Agents of each stage, square numbers.
        window_size: Height and width of the windows.
        mlp_ratio: Hidden channels of the MLPs, in units of C.
        qkv_bias: Whether the query, key and value projection has a bias.
        drop_rate: Dropout before the head.
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
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        lengths = [len(values) for values in (depths, num_heads, agent_blocks, num_agents)]
        if len(set(lengths)) > 1:
            raise VizattnError(
                "depths, num_heads, agent_blocks and num_agents need an entry for each stage, not "
                f"{', '.join(map(str, lengths))}."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            None,
            patch_size,
            in_chans,
            embed_dim,
            partial(LayerNorm2d, eps=1e-5),
            output_fmt="NCHW",
            dynamic_img_pad=True,
            **dd,
        )
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        self.feature_info = []
        for i, grid_size in enumerate(_grids(to_2tuple(img_size), patch_size, len(depths))):
            dim, heads = embed_dim * 2**i, num_heads[i]
            blocks: list[nn.Module] = []
            for j in range(depths[i]):
                attn: nn.Module
                if j < agent_blocks[i]:
                    attn = AgentAttention(
                        dim, heads, grid_size, qkv_bias=qkv_bias, num_agents=num_agents[i], **drops, **dd
                    )
                else:
                    attn = WindowAttention(
                        dim, heads, qkv_bias=qkv_bias, window_size=window_size, shift=j % 2 == 1, **drops, **dd
                    )
                blocks.append(
                    TransformerBlock(
                        dim,
                        attn,
                        mlp_ratio=mlp_ratio,
                        proj_drop=proj_drop_rate,
                        drop_path=drop_paths[i][j],
                        norm_layer=nn.LayerNorm,
                        **dd,
                    )
                )
            stages.append(AgentSwinStage(PatchMerging(dim // 2, dim, **dd) if i else nn.Identity(), blocks))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": patch_size * 2**i})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm2d(self.num_features, eps=1e-5, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters an optimizer should not decay, besides vectors."""
        return {name for name, _ in self.named_parameters() if name.endswith(("_bias", "_bias_table"))}

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
        """Replace the head (0 classes: none), keeping type, device, mode, and the pooling unless one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another image size the native one: the agents' tables of positions are resized for good."""
        for stage, grid_size in zip(self.stages, _grids(to_2tuple(img_size), self.patch_size, len(self.stages))):
            for block in stage.blocks:  # type: ignore[union-attr]
                if isinstance(block.attn, AgentAttention):
                    block.attn.set_grid_size(grid_size)
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
            x, self.patch_embed, self.stages, self.norm, indices, norm, stop_early, output_fmt, intermediates_only
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
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Appendix of arXiv:2312.08874; widths and heads are Swin's.
SIZES: dict[str, dict[str, Any]] = {
    "agent_swin_tiny": {},
    "agent_swin_small": {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)},
    "agent_swin_base": {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "agent_blocks": (2, 2, 2, 0),
    },
}


def _cfg(file_id: str) -> dict[str, Any]:
    return imagenet_cfg(
        url=f"https://cloud.tsinghua.edu.cn/f/{file_id}/?dl=1",
        first_conv="patch_embed.proj",
        classifier="head.fc",
        license="none stated",
        paper_ids="arXiv:2312.08874",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
        crop_pct=0.875,
    )


default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.in1k": _cfg("a2ddc1190c224f768a41"),
        "agent_swin_small.in1k": _cfg("f607172c9fea4d6e99bb"),
        "agent_swin_base.in1k": _cfg("4fcd2d0114bb490483c3"),
    }
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: AgentSwin) -> dict[str, Tensor]:
    """Released weights, or ours, under our keys, with the agents' tables of positions in the sizes of `model`.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = {}
    for key, value in unwrap(checkpoint).items():
        if key.endswith(("relative_position_index", "attn_mask")):  # the release stores what it computes
            continue
        merging = re.match(r"layers\.(\d+)\.downsample\.(.*)", key)  # it halves the map at the end of a stage
        if merging:
            key = f"stages.{int(merging[1]) + 1}.downsample.{merging[2]}"
        key = re.sub(r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks.", key)
        state_dict[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)] = value

    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):  # type: ignore[arg-type]
            if isinstance(block.attn, AgentAttention):
                grid_size = (block.attn.ah_bias.shape[3], block.attn.aw_bias.shape[4])
                resize_agent_tables(state_dict, grid_size, f"stages.{i}.blocks.{j}.attn.")
    check_fit(state_dict, model, adapted=("head.fc.", "patch_embed.proj.weight"))
    return state_dict


def released_layout(state_dict: dict[str, Tensor], model: AgentSwin, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the release, with its tables of offsets and its masks of shifted windows."""
    renames: Renames = [
        (r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", "layers."),
        (r"^head\.fc\.", "head."),
    ]
    released = {rename(key, renames): value for key, value in state_dict.items()}
    grids = _grids(cfg.input_size[-2:], model.patch_size, len(model.stages))
    for i, (stage, grid_size) in enumerate(zip(model.stages, grids)):
        for j, block in enumerate(stage.blocks):  # type: ignore[arg-type]
            if isinstance(block.attn, WindowAttention):
                name, window = f"layers.{i}.blocks.{j}", block.attn.window_size
                released[f"{name}.attn.relative_position_index"] = _offsets(window)
                if block.attn.shift and min(grid_size) > window[0]:
                    released[f"{name}.attn_mask"] = _shift_mask(grid_size, window)
    return {"model": released}


def _offsets(window: tuple[int, int]) -> Tensor:
    """Where Swin's bias table has the offset of query and key: (L, L)."""
    y, x = (torch.arange(side) for side in window)
    dy, dx = y[:, None] - y + window[0] - 1, x[:, None] - x + window[1] - 1
    return (dy[:, None, :, None] * (2 * window[1] - 1) + dx[:, None, :]).flatten(2).flatten(0, 1)


def _shift_mask(grid_size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """What Swin adds to the scores in windows of the rolled map, -100 between its ends: (windows, L, L)."""
    rows, columns = (
        (torch.arange(side) >= side - size).int() + (torch.arange(side) >= side - size // 2).int()
        for side, size in zip(grid_size, window)
    )
    part = (3 * rows[:, None] + columns).unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    part = part.transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(part[:, :, None] == part[:, None, :], 0.0, -100.0)


def _create(name: str, pretrained: bool, **kwargs: Any) -> AgentSwin:
    return build(
        AgentSwin,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
