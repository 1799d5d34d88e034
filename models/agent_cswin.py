"""CSwin with agent attention in its early stages: they see the whole map at linear cost, the late ones a cross.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., ECCV 2024), arXiv:2312.08874,
on the layout of the CSWin Transformer, arXiv:2107.00652. The attentions are `AgentAttention` and
`CrossShapedAttention` of `vizattn.attention`.

Shapes: B batch, H x W tokens of a map, C channels. Maps are (B, C, H, W) between the stages, tokens (B, N, C) inside.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
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
from vizattn.attention.cross_shaped import CrossShapedAttention
from vizattn.errors import VizattnError
from vizattn.layers import TransformerBlock

from ._build import build, imagenet_cfg
from ._checkpoint import Renames, check_fit, rename, unwrap
from ._pyramid import stage_intermediates
from ._registry import register_sizes

__all__ = ["AgentCSwin"]


class OverlappingPatches(nn.Module):
    """A strided convolution whose patches overlap, then a norm. Zeros fill up a map that the stride does not divide.

    Args:
        in_chs: Channels of the map before.
        dim: Channels of the map.
        kernel_size: Height and width of a patch.
        stride: Distance of the patches.
        padding: Zeros around the map.
    """

    def __init__(
        self,
        in_chs: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stride = stride
        self.conv = nn.Conv2d(in_chs, dim, kernel_size, stride, padding, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return self.norm(self.conv(x))


class AgentCSwinStage(nn.Module):
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


def _grids(img_size: tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """The maps that an image gives."""
    return [(-(-img_size[0] // r), -(-img_size[1] // r)) for r in (4 * 2**i for i in range(stages))]


class AgentCSwin(nn.Module):
    """Pyramid of four stages (or fewer), attending by agents, then in cross-shaped windows. Takes images of any size.

    Args:
        img_size: Native height and width: the size of the agents' position tables.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" to keep the map.
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        agent_stages: How many stages, from the first on, attend by agents. The others attend in stripes of the map, and
            the last one to all of it.
        num_agents: Agents of each stage that has them, square numbers.
        split_size: Width of the stripes.
        mlp_ratio: Hidden channels of the MLPs, in units of C.
        qkv_bias: Whether the query, key and value projection has a bias.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0, arXiv:1603.09382.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Raises:
        VizattnError: Lists of lengths that do not fit each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_stages: int = 2,
        num_agents: Sequence[int] = (9, 16),
        split_size: int = 7,
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
        if len(depths) != len(num_heads) or len(num_agents) != agent_stages or agent_stages > len(depths):
            raise VizattnError(
                "depths and num_heads need an entry for each stage and num_agents one for each stage with agents, not "
                f"{len(depths)}, {len(num_heads)} and {len(num_agents)} (agent_stages={agent_stages})."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.grad_checkpointing = False

        self.stem = OverlappingPatches(in_chans, embed_dim, 7, 4, 2, **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        self.feature_info = []
        for i, grid_size in enumerate(_grids(to_2tuple(img_size), len(depths))):
            dim, heads = embed_dim * 2**i, num_heads[i]
            blocks: list[nn.Module] = []
            for drop_path in drop_paths[i]:
                attn: nn.Module
                if i < agent_stages:
                    attn = AgentAttention(
                        dim, heads, grid_size, qkv_bias=qkv_bias, num_agents=num_agents[i], **drops, **dd
                    )
                else:
                    branches = 1 if i == len(depths) - 1 else 2
                    attn = CrossShapedAttention(dim, heads, split_size, branches, qkv_bias=qkv_bias, **drops, **dd)
                blocks.append(
                    TransformerBlock(
                        dim,
                        attn,
                        mlp_ratio=mlp_ratio,
                        proj_drop=proj_drop_rate,
                        drop_path=drop_path,
                        norm_layer=nn.LayerNorm,
                        **dd,
                    )
                )
            downsample = OverlappingPatches(dim // 2, dim, 3, 2, 1, **dd) if i else nn.Identity()
            stages.append(AgentCSwinStage(downsample, blocks))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": 4 * 2**i})
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
        return {name for name, _ in self.named_parameters() if name.endswith("_bias")}

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

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another image size the native one: the agents' tables of positions are resized for good."""
        for stage, grid_size in zip(self.stages, _grids(to_2tuple(img_size), len(self.stages))):
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


# Appendix of arXiv:2312.08874.
SIZES: dict[str, dict[str, Any]] = {
    "agent_cswin_tiny": {},
    "agent_cswin_small": {"depths": (3, 6, 29, 2)},
    "agent_cswin_base": {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)},
}


def _cfg(file_id: str) -> dict[str, Any]:
    return imagenet_cfg(
        url=f"https://cloud.tsinghua.edu.cn/f/{file_id}/?dl=1",
        first_conv="stem.conv",
        classifier="head.fc",
        license="none stated",
        paper_ids="arXiv:2312.08874",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
    )


default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.in1k": _cfg("8c562a74441e46d5902b"),
        "agent_cswin_small.in1k": _cfg("30eb8af675bc4b7a8747"),
        "agent_cswin_base.in1k": _cfg("c8035b0839b2410c8c9f"),
    }
)

# Names of the release, which counts stages from one, to ours.
RENAMED = (
    (r"^stage1_conv_embed\.0\.", "stem.conv."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge(\d+)\.", lambda m: f"stages.{m[1]}.downsample."),
    (r"^stage(\d+)\.(\d+)\.(qkv|proj)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.attn.{m[3]}."),
    (r"^stage(\d+)\.(\d+)\.attns\.(\d)\.get_v\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.attn.lepes.{m[3]}."),
    (r"^stage(\d+)\.(\d+)\.attns\.0\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.attn."),
    (r"^stage(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: AgentCSwin) -> dict[str, Tensor]:
    """Released weights, or ours, under our keys, with the agents' tables in the sizes of `model`.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    agents = {name: module for name, module in model.named_modules() if isinstance(module, AgentAttention)}
    state_dict = {}
    for key, value in unwrap(checkpoint).items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)  # type: ignore[arg-type]
        block, _, rest = key.partition(".attn.")
        if f"{block}.attn" in agents:
            key = f"{block}.attn." + rest.replace("lepes.0.", "dwc.")
        state_dict[key] = value
    for name, module in agents.items():
        resize_agent_tables(state_dict, (module.ah_bias.shape[3], module.aw_bias.shape[4]), f"{name}.")
    check_fit(state_dict, model, adapted=("head.fc.", "stem.conv.weight"))
    return state_dict


RELEASED: Renames = (
    (r"^stem\.conv\.", "stage1_conv_embed.0."),
    (r"^stem\.norm\.", "stage1_conv_embed.2."),
    (r"^stages\.(\d+)\.downsample\.", r"merge\1."),
    (r"^stages\.(\d+)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}."),
    (r"\.attn\.(qkv|proj)\.", r".\1."),
    (r"\.attn\.lepes\.(\d)\.", r".attns.\1.get_v."),
    (r"\.attn\.dwc\.", ".attns.0.get_v."),
    (r"\.attn\.", ".attns.0."),
    (r"^head\.fc\.", "head."),
)


def released_layout(state_dict: dict[str, Tensor], model: AgentCSwin, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the release."""
    return {"state_dict_ema": {rename(key, RELEASED): value for key, value in state_dict.items()}}


def _create(name: str, pretrained: bool, **kwargs: Any) -> AgentCSwin:
    return build(
        AgentCSwin,
        name,
        pretrained,
        checkpoint_filter_fn,
        {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **SIZES[name] | kwargs,
    )


register_sizes(__name__, SIZES, _create)
