"""What is special to L2ViT: windows and linear attention in turn, the layout of the release, and mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from families import create, images
from reference import load, weights
from torch import Tensor, nn

import vizattn
from vizattn import VizattnError
from vizattn.attention import LinearAttention, WindowAttention
from vizattn.models.l2vit import L2ViT, checkpoint_filter_fn


def released_tiny() -> dict[str, Tensor]:
    return {key: value.float() for key, value in weights(load("l2vit_tiny")).items()}


@pytest.mark.parametrize("nesting", [(), ("model",), ("state_dict",), ("state_dict", "model")])
def test_released_weights_in_any_nesting(nesting: tuple[str, ...]) -> None:
    checkpoint: dict[str, Any] = released_tiny()
    for key in nesting:
        checkpoint = {key: checkpoint}
    model = timm.create_model("l2vit_tiny")
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)


def test_own_weights_pass_unchanged() -> None:
    model = timm.create_model("l2vit_nano")
    own = model.state_dict()
    passed = checkpoint_filter_fn(dict(own), model)
    assert list(passed) == list(own)
    assert all(torch.equal(passed[key], own[key]) for key in own)


def test_weights_of_another_size_are_refused_by_name() -> None:
    model = timm.create_model("l2vit_small")
    with pytest.raises(VizattnError, match=r"do not fit this L2ViT: \d+ missing \(stages\.2\.blocks\.6\.cpe1"):
        checkpoint_filter_fn({"model": released_tiny()}, model)


def test_other_classes_and_channels_are_adapted() -> None:
    overlay = {"state_dict": {"model": released_tiny()}}
    model = timm.create_model("l2vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_attentions_take_turns() -> None:
    model = timm.create_model("l2vit_nano", depths=(3, 2, 1))
    kinds = [[type(block.attn) for block in stage.blocks] for stage in model.stages]
    assert kinds == [
        [WindowAttention, LinearAttention, WindowAttention],
        [WindowAttention, LinearAttention],
        [WindowAttention],
    ]


def test_larger_windows_at_384() -> None:
    model = timm.create_model("l2vit_base_window12_384", embed_dims=(32,) * 4, num_heads=(1,) * 4, depths=(1,) * 4)
    assert {m.window_size for m in model.modules() if isinstance(m, WindowAttention)} == {(12, 12)}
    assert model.default_cfg["input_size"] == (3, 384, 384)


def test_maps_stay_channels_last_between_blocks() -> None:
    """Else every depthwise convolution would begin and end with a copy."""
    model = create("l2vit")
    copies = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_pre_hook(
                lambda _module, inputs: copies.append(not inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    model(images((64, 64)))
    assert copies
    assert not any(copies)


@pytest.mark.parametrize("size", [(64, 64), (33, 45)])
def test_fused_for_inference(size: tuple[int, int]) -> None:
    model = create("l2vit").double()
    x = images(size).double()
    expected = model(x)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    fused = vizattn.fuse(model)
    torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-10)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == norms - 2  # those of the stem


def test_errors() -> None:
    with pytest.raises(VizattnError, match="need an entry a stage, not 4, 3 and 4"):
        L2ViT(depths=(1, 1, 1))
    with pytest.raises(VizattnError, match="stem_stride must be 4 or 2, not 3"):
        L2ViT(stem_stride=3)
    with pytest.raises(TypeError):
        L2ViT(embed_dim=96)  # type: ignore[call-arg]
