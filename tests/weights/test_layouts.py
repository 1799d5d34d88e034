"""Each layout in which weights are released, from a server to logits, and back to the released file."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from reference import load
from safetensors.torch import load_file, save
from server import Answer, Server
from timm.models import PretrainedCfg, model_entrypoint
from torch import Tensor

from vizattn.cli import main
from vizattn.errors import VizattnError
from vizattn.weights import cached_file, find, lock_file, released, save_released


@dataclass
class Layout:
    """A release, a smaller size of its model, and what its files have besides the weights."""

    small: dict[str, Any]
    has: list[str]
    """Keys of the release, from its documentation."""
    extras: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    """Another native size, for models with tables of positions."""


class Settings(dict[str, Any]):
    """As yacs.config.CfgNode: a dictionary with attributes."""

    def __init__(self) -> None:
        super().__init__(MODEL={"DROP_PATH": 0.2})
        self.frozen = False


Settings.__module__, Settings.__qualname__ = "yacs.config", "CfgNode"
OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
TRAINED = {"epoch": 299, "optimizer": OPTIMIZER, "args": argparse.Namespace(lr=1e-3, output_dir=None)}
FOUR = {"depths": (1, 1, 1, 1)}
NAT = {**FOUR, "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
BIFORMER = {**FOUR, "embed_dims": (32, 64, 96, 128)}
LAYOUTS = {
    "nat_mini.in1k": Layout(
        NAT,
        [
            "patch_embed.proj.1.weight",
            "levels.0.downsample.reduction.weight",
            "head.bias",
        ],
    ),
    "nat_base.in1k": Layout(
        NAT,
        [
            "levels.3.blocks.0.gamma2",
            "levels.0.blocks.0.attn.rpb",
        ],
    ),
    "dinat_tiny.in1k": Layout(
        NAT,
        [
            "levels.2.blocks.0.attn.rpb",
            "norm.weight",
        ],
    ),
    "dinat_s_tiny.in1k": Layout(
        NAT,
        [
            "layers.0.blocks.0.attn.rpb",
            "layers.2.downsample.reduction.weight",
        ],
    ),
    "biformer_tiny.in1k": Layout(
        BIFORMER,
        [
            "downsample_layers.0.3.weight",
            "stages.0.0.attn.qkv.qkv.weight",
            "stages.0.0.attn.wo.bias",
            "stages.0.0.mlp.3.bias",
            "stages.3.0.attn.qkv.weight",
            "stages.3.0.attn.lepe.bias",
            "norm.running_mean",
        ],
        TRAINED | {"scaler": {"scale": 65536.0}, "best": np.float64(81.4)},
    ),
    "biformer_stl.in1k": Layout(
        BIFORMER,
        [
            "stages.0.blocks.0.mlp.2.weight",
            "stages.0.blocks.0.attn.wo.bias",
        ],
        TRAINED,
    ),
    "deit_agent_tiny.in1k": Layout(
        {"embed_dim": 48, "num_heads": 3, "depth": 2},
        [
            "blocks.0.attn.an_bias",
            "blocks.0.attn.ac_bias",
            "blocks.1.attn.dwc.bias",
        ],
        TRAINED,
        192,
    ),
    "agent_pvt_tiny.in1k": Layout(
        {**FOUR, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
        [
            "pos_embed1",
            "patch_embed4.norm.bias",
            "block1.0.attn.q.weight",
            "block1.0.attn.kv.bias",
        ],
        TRAINED,
        192,
    ),
    "agent_swin_small.in1k": Layout(
        {"embed_dim": 24, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 4, 8), "agent_blocks": (1, 1, 0, 0)},
        [
            "layers.0.blocks.0.attn.ha_bias",
            "layers.2.blocks.0.attn.relative_position_index",
            "layers.2.blocks.1.attn_mask",
            "layers.0.downsample.norm.weight",
        ],
        {"epoch": 299, "optimizer": OPTIMIZER, "max_accuracy": np.float64(83.7), "config": Settings()},
        192,
    ),
    "agent_cswin_tiny.in1k": Layout(
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
        [
            "stage1.0.attns.0.get_v.weight",
            "stage1.0.attns.0.an_bias",
            "stage3.1.attns.1.get_v.bias",
            "merge1.conv.weight",
            "stage1_conv_embed.2.bias",
            "stage4.0.qkv.weight",
        ],
        {"state_dict": {"worse": torch.ones(2)}, "arch": "CSWin", "metric": 83.1, "version": 2, **TRAINED},
        192,
    ),
    "efficientvit_va_m0.in1k": Layout(
        {"embed_dims": (32, 48, 64), "depths": (1, 1, 1), "num_heads": (2, 2, 2), "kernel_sizes": (5, 5)},
        [
            "patch_embed.0.c.weight",
            "blocks1.0.mixer.m.attn.qkvs.0.c.weight",
            "blocks2.1.se.fc1.bias",
            "head.l.bias",
            "blocks1.0.mixer.m.attn.attention_bias_idxs",
        ],
        {"model_ema": {"worse": torch.ones(2)}, "lr_scheduler": {"last": np.arange(3)}, **TRAINED},
    ),
    "efficientvit_va_m0.r224_in1k": Layout(
        {"embed_dims": (32, 48, 64), "depths": (1, 1, 1), "num_heads": (2, 2, 2), "kernel_sizes": (5, 5)},
        [
            "patch_embed.conv1.conv.weight",
            "stages.1.downsample.res1.0.m.conv.weight",
            "head.linear.bias",
        ],
    ),
    "l2vit_tiny.in1k": Layout(
        {"embed_dims": (16, 32, 48, 64), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)},
        [
            "downsample_layers.0.proj.proj.0.weight",
            "stages.0.0.cpe.1.proj.bias",
            "stages.0.1.attn.temperature",
            "stages.0.1.local_mp.bn.running_var",
        ],
        TRAINED | {"scaler": {"scale": 65536.0}},
    ),
    "vit_va_tiny_patch16_224.augreg_in21k_ft_in1k": Layout(
        {"embed_dim": 48, "depth": 2, "num_heads": 3},
        [
            "cls_token",
            "blocks.1.attn.qkv.bias",
            "head.bias",
        ],
        {},
        192,
    ),
}


def random_values(shapes: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key, value in state.items():
        if key.endswith("running_var"):
            state[key] = value.abs() + 0.5
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    return state


def flat(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return next((part for part in checkpoint.values() if isinstance(part, dict)), checkpoint)


def matrices(checkpoint: dict[str, Any]) -> None:
    """EfficientViT's files have matrices where its code has 1 x 1 convolutions."""
    for key, value in flat(checkpoint).items():
        if key.endswith(".c.weight") and value.shape[2:] == (1, 1) and value.shape[1] > 1:
            flat(checkpoint)[key] = value[:, :, 0, 0]


@pytest.fixture
def served(name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, bytes]:
    """The model in a smaller size with random weights, and its published file, at its address on our server."""
    layout, cfg = LAYOUTS[name], find(name)
    family = sys.modules[model_entrypoint(str(cfg.architecture)).__module__]
    monkeypatch.setitem(family.SIZES, cfg.architecture, family.SIZES[cfg.architecture] | layout.small)
    publish(cfg, server, tmp_path, monkeypatch)
    model = timm.create_model(str(cfg.architecture)).eval()
    model.load_state_dict(random_values({key: value.shape for key, value in model.state_dict().items()}))

    checkpoint = released(model.state_dict(), cfg)
    assert set(layout.has) <= set(flat(checkpoint))
    matrices(checkpoint)
    for module in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules["yacs.config"], "CfgNode", Settings, raising=False)
    file = io.BytesIO()
    torch.save(layout.extras | checkpoint, file)
    monkeypatch.delitem(sys.modules, "yacs.config")  # who loads it does not have it
    content = save(checkpoint) if cfg.hf_hub_id else file.getvalue()
    path = f"{cfg.hf_hub_id}/resolve/main/model.safetensors" if cfg.hf_hub_id else urlsplit(str(cfg.url)).path[1:]
    server.files[path] = content
    return model, content


def publish(cfg: PretrainedCfg, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bend the address of a release to our server."""
    if cfg.hf_hub_id:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        server.etag, server.always = f'"{"a" * 40}"', Answer(headers={"X-Repo-Commit": "b" * 40})
        return
    address = urlsplit(str(cfg.url))
    there = dataclasses.replace(cfg, url=f"{server.url}{address.path}?{address.query}".rstrip("?"))
    for key in (str(cfg.architecture), f"{cfg.architecture}.{cfg.tag}"):
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, key, there)


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_a_server_to_logits_and_back(
    name: str, served: tuple[Any, bytes], server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model, content), cfg, layout = served, find(name), LAYOUTS[name]
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        loaded = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(loaded(x), expected) and expected.std() > 0
        assert "adapted" not in caplog.text

        (tmp_path / "got by hand").write_bytes(content)
        overlay = {"file": str(tmp_path / "got by hand")}
        by_hand = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(by_hand(x), expected)

        for address in ({}, overlay):
            size = {"img_size": layout.img_size} if layout.img_size else {}
            other = timm.create_model(
                name, pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay=address, **size
            )
            said = caplog.messages[-1]
            assert "newly initialised for 3 classes, the weights are for 1000" in said
            assert "is made for 1 channels from 3" in said
            assert ("; resized: " in said) == bool(size)
            side = layout.img_size or 224
            assert other.eval()(x[:, :1, :side, :side]).shape == (1, 3)

    downloads = [path for path, headers in server.requests if not path.startswith("/api/")]
    assert len(downloads) == (2 if cfg.hf_hub_id else 1), "a HEAD and a GET, or a GET"
    assert name in lock_file().read_text()

    back = tmp_path / ("back.safetensors" if cfg.hf_hub_id else "back.pth")
    assert main(["weights", "convert", str(cached_file(name)), name, "--back", "--output", str(back)]) == 0
    restored = load_file(back) if cfg.hf_hub_id else torch.load(back, weights_only=True)
    again = released(model.state_dict(), cfg)
    assert [key for key, part in restored.items() if isinstance(part, dict)] == [
        key for key, part in again.items() if isinstance(part, dict)
    ]
    assert flat(restored).keys() == flat(again).keys()
    assert all(torch.equal(value, flat(again)[key]) for key, value in flat(restored).items())


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("agent_deit_tiny", "deit_agent_tiny.in1k"),
        ("agent_pvt_tiny", "agent_pvt_tiny.in1k"),
        ("agent_swin_tiny", "agent_swin_tiny.in1k"),
        ("biformer_tiny", "biformer_tiny.in1k"),
        ("dinat_mini", "dinat_mini.in1k"),
        ("nat_mini", "nat_mini.in1k"),
        ("efficientvit_m0", "efficientvit_va_m0.in1k"),
        ("efficientvit_m4", "efficientvit_va_m4.in1k"),
        ("timm_efficientvit_m0", "efficientvit_va_m0.r224_in1k"),
        ("timm_vit_tiny_patch16_224", "vit_va_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("l2vit_tiny", "l2vit_tiny.in1k"),
    ],
)
def test_there_and_back_has_the_keys_of_the_release(case: str, name: str) -> None:
    """Keys and shapes are those recorded of the published code, and each value returns to its place."""
    shapes = {key: tuple(shape) for key, shape in load(case)["keys"]}
    computed = {key for key in shapes if key.endswith(("relative_position_index", "attention_bias_idxs"))}
    state = random_values({key: shape for key, shape in shapes.items() if key not in computed})
    result = flat(released({"model": state}, find(name)))
    assert {key: tuple(value.shape) for key, value in result.items()} == shapes
    assert all(torch.equal(result[key], value) for key, value in state.items())
    assert all(result[key].dtype == torch.int64 for key in computed)


def test_tables_are_those_of_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    name, small = "agent_swin_small", LAYOUTS["agent_swin_small.in1k"].small
    monkeypatch.setitem(sys.modules[model_entrypoint(name).__module__].SIZES, name, small)
    result = released(timm.create_model(name).state_dict(), find(f"{name}.in1k"))["model"]
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    blocks = swin.layers[2].blocks
    for i in range(2):
        index = result[f"layers.2.blocks.{i}.attn.relative_position_index"]
        assert torch.equal(index, blocks[i].attn.relative_position_index)
    assert torch.equal(result["layers.2.blocks.1.attn_mask"], blocks[1].attn_mask)
    assert [key for key in result if key.endswith("attn_mask")] == ["layers.2.blocks.1.attn_mask"]


def test_tables_are_those_of_efficientvit() -> None:
    theirs = timm.create_model("efficientvit_m0").stages
    with torch.device("meta"):
        state = timm.create_model("efficientvit_va_m0").state_dict()
    ours = {key: torch.zeros(value.shape) for key, value in state.items()}
    result = released(ours, find("efficientvit_va_m0.in1k"))["model"]
    for key, block in (("blocks1.0", theirs[0].blocks[0]), ("blocks3.5", theirs[2].blocks[2])):
        index = result[f"{key}.mixer.m.attn.attention_bias_idxs"]
        assert torch.equal(index, block.mixer.m.attn.attention_bias_idxs)


def test_back_is_refused_where_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(VizattnError, match="has only our own weights"):
        released({}, find("vit_va_nano_patch4_32"))
    with pytest.raises(VizattnError, match=r"end x\.safetensors in \.pth"):
        save_released({"model": {"x": torch.ones(1)}}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    state = {"x": torch.ones(1)}
    with pytest.raises(VizattnError, match="do not fit"):
        released(state, find("nat_mini.in1k"))
