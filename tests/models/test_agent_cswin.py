"""Agent CSwin: the names of the release, and tables of positions at other sizes."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from vizattn import VizattnError
from vizattn.models.agent_cswin import AgentCSwin, checkpoint_filter_fn

SMALL = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_agents": (4, 4), "num_classes": 3, "img_size": 64}


def released(model: AgentCSwin) -> dict[str, torch.Tensor]:
    """The weights of `model` under the names of the release."""
    names = {
        r"^stem\.conv": "stage1_conv_embed.0",
        r"^stem\.norm": "stage1_conv_embed.2",
        r"^stages\.(\d)\.downsample": r"merge\1",
        r"\.attn\.(qkv|proj)": r".\1",
        r"\.attn\.lepes\.(\d)": r".attns.\1.get_v",
        r"\.attn\.dwc": ".attns.0.get_v",
        r"\.attn\.(\w\w_bias)": r".attns.0.\1",
        r"^head\.fc": "head",
    }
    renamed = {}
    for key, value in model.state_dict().items():
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        key = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"stage{int(m[1]) + 1}", key)
        renamed[key] = value
    return renamed


def test_released_layout() -> None:
    torch.manual_seed(0)
    source, target = (timm.create_model("agent_cswin_tiny", **SMALL).eval() for _ in range(2))
    state = released(source)
    assert {"stage1.0.attns.0.get_v.weight", "stage3.1.attns.1.get_v.bias", "merge2.conv.weight", "head.weight"} <= set(
        state
    )
    target.load_state_dict(checkpoint_filter_fn({"state_dict_ema": state, "epoch": 3}, target), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(target(x), source(x))


def test_tables_follow_the_native_size() -> None:
    source = timm.create_model("agent_cswin_tiny", **SMALL).eval()
    target = timm.create_model("agent_cswin_tiny", **SMALL | {"img_size": (96, 64)}).eval()
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)
    source.set_input_size((96, 64))
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(target(x), source(x))


def test_other_weights_are_named() -> None:
    model = timm.create_model("agent_cswin_tiny", **SMALL)
    state = released(model)
    del state["stage1.0.norm1.weight"]
    with pytest.raises(VizattnError, match=r"1 missing \(stages\.0\.blocks\.0\.norm1\.weight\)"):
        checkpoint_filter_fn(state, model)
    with pytest.raises(VizattnError, match=r"agent_stages=2"):
        AgentCSwin(depths=(1, 1, 1), num_heads=(2, 2, 2), num_agents=(9,))
