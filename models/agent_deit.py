"""DeiT with agent attention: an isotropic transformer whose cost grows linearly with the number of tokens.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., ECCV 2024), arXiv:2312.08874.
The model is `VisionTransformer`, the attention `vizattn.attention.AgentAttention`.
"""

from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import PretrainedCfg, generate_default_cfgs
from torch import Tensor

from vizattn.attention.agent import resize_agent_tables

from ._build import build, glyphs_cfg, imagenet_cfg
from ._checkpoint import check_fit, unwrap
from ._registry import register_sizes
from .vit import VisionTransformer

__all__: list[str] = []


def _size(dim: int, heads: int, num_agents: int = 49, **kwargs: Any) -> dict[str, Any]:
    options = {"agent": {"num_agents": num_agents}}
    return {"embed_dim": dim, "num_heads": heads, "depth": 12, "attn": "agent", "attn_kwargs": options, **kwargs}


# Appendix of arXiv:2312.08874; base has agents in its first blocks only.
SIZES: dict[str, dict[str, Any]] = {
    "deit_agent_nano_patch4_32": _size(96, 3, 16, depth=6, img_size=32, patch_size=4),
    "deit_agent_tiny": _size(192, 3),
    "deit_agent_small": _size(384, 6),
    "deit_agent_base": _size(768, 12, 81, attn=["agent"] * 4 + ["softmax"] * 8),
}


def _cfg(file_id: str) -> dict[str, Any]:
    return imagenet_cfg(
        url=f"https://cloud.tsinghua.edu.cn/f/{file_id}/?dl=1",
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier="head",
        license="none stated",
        paper_ids="arXiv:2312.08874",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
        crop_pct=0.875,
    )


default_cfgs = generate_default_cfgs(
    {
        "deit_agent_nano_patch4_32.glyphs": glyphs_cfg(
            "deit_agent_nano_patch4_32",
            pool_size=None,
            first_conv="patch_embed.proj",
            classifier="head",
            paper_ids="arXiv:2312.08874",
        ),
        "deit_agent_tiny.in1k": _cfg("57e0904221824ee7b7af"),
        "deit_agent_small.in1k": _cfg("fdd43304372541db8ea7"),
        "deit_agent_base.in1k": _cfg("5115f15fdd7e4ab58fbc"),
    }
)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Fit released weights, whose keys are ours, to the grid and the patch size of `model`.

    Raises:
        VizattnError: The weights are of another model; what differs is named.
    """
    state_dict = unwrap(checkpoint)
    grid_size, patch_size = model.patch_embed.grid_size, model.patch_embed.patch_size
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.ah_bias", "blocks.0.attn.aw_bias")
    kernel, table, tall, wide = (state_dict.get(name) for name in names)
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-2:] != patch_size:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(patch_size))
    if table is not None and tall is not None and wide is not None:  # the biases tell the map that all are for
        state_dict["pos_embed"] = resample_abs_pos_embed(
            table,
            new_size=list(grid_size),
            old_size=[tall.shape[3], wide.shape[4]],
            num_prefix_tokens=model.num_embedded_prefix,
        )
    for i in range(len(model.blocks)):
        resize_agent_tables(state_dict, grid_size, f"blocks.{i}.attn.")
    check_fit(state_dict, model, adapted=("head.", "patch_embed.proj.weight"))
    return state_dict


def released_layout(state_dict: dict[str, Tensor], model: VisionTransformer, cfg: PretrainedCfg) -> dict[str, Any]:
    """Our weights as in the release, which has our keys."""
    return {"model": dict(state_dict)}


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
