"""What is special to BiFormer: regions of any map, both layouts of the release, fusing, and mistakes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from families import create, images
from reference import load, weights
from torch import Tensor

import vizattn
from vizattn import VizattnError
from vizattn.models.biformer import BiFormer, checkpoint_filter_fn


def released_tiny() -> dict[str, Tensor]:
    return {key: value.float() for key, value in weights(load("biformer_tiny")).items()}


@pytest.mark.parametrize("nesting", [(), ("model",), ("state_dict",), ("state_dict", "model")])
def test_released_weights_in_any_nesting(nesting: tuple[str, ...]) -> None:
    checkpoint: dict[str, Any] = released_tiny()
    for key in nesting:
        checkpoint = {key: checkpoint}
    model = timm.create_model("biformer_tiny")
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)


@pytest.mark.parametrize("name", ["biformer_nano", "biformer_stl"])
def test_own_weights_pass_unchanged(name: str) -> None:
    model = timm.create_model(name, depths=(1,) * (3 if name == "biformer_nano" else 4))
    own = model.state_dict()
    passed = checkpoint_filter_fn(dict(own), model)
    assert list(passed) == list(own)
    assert all(torch.equal(passed[key], own[key]) for key in own)


def test_swin_tiny_layout_of_the_release() -> None:
    """Blocks are one level deeper there, and the MLP's second layer is number 2."""
    model = timm.create_model("biformer_stl", depths=(1, 1, 1, 1))
    released = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (
            (r"^stem\.conv\.", "downsample_layers.0.0."),
            (r"^stem\.bn\.", "downsample_layers.0.1."),
            (r"^stages\.(\d)\.downsample\.conv\.", r"downsample_layers.\1.0."),
            (r"^stages\.(\d)\.downsample\.bn\.", r"downsample_layers.\1.1."),
            (r"^(stages\.[012].*)\.attn\.qkv\.", r"\1.attn.qkv.qkv."),
            (r"^(stages\.[012].*)\.attn\.proj\.", r"\1.attn.wo."),
            (r"mlp\.fc1", "mlp.0"),
            (r"mlp\.fc2", "mlp.2"),
            (r"^head\.fc\.", "head."),
        ):
            key = re.sub(ours, theirs, key)
        released[key] = value
    converted = checkpoint_filter_fn({"model": released}, model)
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


def test_weights_of_another_size_are_refused_by_name() -> None:
    model = timm.create_model("biformer_small")
    with pytest.raises(VizattnError, match=r"do not fit this BiFormer: \d+ missing \(stages\.0\.blocks\.2\.pos_embed"):
        checkpoint_filter_fn({"model": released_tiny()}, model)


def test_other_classes_and_channels_are_adapted() -> None:
    overlay = {"state_dict": {"model": released_tiny()}}
    model = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1
    )
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("kwargs", [{}, {"patchify": True, "stem_stride": 4}], ids=["convolutions", "patches"])
def test_fused_for_inference(kwargs: dict[str, Any]) -> None:
    model = create("biformer", **kwargs)
    x = images((64, 48))
    before = model(x)
    vizattn.fuse(model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert names == ["norm"]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_patches_of_any_size() -> None:
    model = create("biformer", patchify=True, stem_stride=4)
    for size in ((64, 48), (33, 45), (1, 70)):
        maps = model.forward_intermediates(images(size), intermediates_only=True)
        assert [m.shape[2:] for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16)]


def test_fixed_regions_grow_in_number() -> None:
    """At the native size both ways of cutting agree; at twice that size they do not."""
    same = create("biformer", region_size=4, n_win=1)
    counted = create("biformer", n_win=4)
    same.load_state_dict(counted.state_dict())
    x = images((32, 32))  # maps of 16, 8, 4: four regions of 4 a side, then two
    torch.testing.assert_close(same.stages[0](same.stem(x)), counted.stages[0](counted.stem(x)))
    x = images((64, 64))
    assert not torch.allclose(same(x), counted(x), rtol=1e-3)


def test_everything_is_routed_to_if_there_are_few_regions() -> None:
    """Then the number of regions has no influence."""
    few, many = create("biformer", n_win=1), create("biformer", n_win=4, topk=(16, 16))
    x = images((33, 45))
    torch.testing.assert_close(few(x), many(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1)}, "embed_dims and depths need an entry a stage and topk one fewer, not 3, 2 and 2"),
        ({"stem_stride": 8}, "stem_stride must be 4, or 2 without patchify, not 8"),
        ({"patchify": True}, "stem_stride must be 4, or 2 without patchify, not 2"),
        ({"head_dim": 24}, "head_dim 24 does not divide the 32 channels of stage 0"),
        ({"last_heads": 3}, "dim 128 cannot be split into 3 heads"),
        ({"n_win": 0}, "n_win of bilevel_routing must be at least 1"),
    ],
)
def test_mistakes(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        timm.create_model("biformer_nano", **kwargs)
    with pytest.raises(TypeError):
        BiFormer(window=7)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    model = create("biformer", dtype=dtype)
    assert model(images((33, 45)).to(dtype)).dtype == dtype
