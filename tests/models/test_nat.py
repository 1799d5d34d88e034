"""What is special to NAT and DiNAT: small maps, dilations, released layouts, mistakes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from vizattn import VizattnError
from vizattn.attention import NeighborhoodAttention
from vizattn.models.nat import checkpoint_filter_fn

SMALL = {
    "depths": (1, 2),
    "num_heads": (2, 4),
    "embed_dim": 16,
    "dilations": (1, 2),
    "kernel_size": 3,
    "num_classes": 4,
}


def dilations(model: nn.Module) -> list[list[tuple[int, ...]]]:
    return [[block.attn.dilation for block in stage.blocks] for stage in model.stages]  # type: ignore[union-attr]


def test_dilations_alternate_and_may_be_chosen() -> None:
    with torch.device("meta"):
        model = timm.create_model("dinat_mini")
        other = timm.create_model("nat_mini", dilations=(16, 8, 4, 2))
    assert dilations(model) == [
        [(1, 1), (8, 8), (1, 1)],
        [(1, 1), (4, 4)] * 2,
        [(1, 1), (2, 2)] * 3,
        [(1, 1)] * 5,
    ]
    assert dilations(other)[0] == [(1, 1), (16, 16), (1, 1)]


def test_layer_scale_where_the_releases_have_it() -> None:
    with torch.device("meta"):
        scaled = [
            any("gamma" in key for key in timm.create_model(name).state_dict())
            for name in ("nat_tiny", "nat_small", "nat_base", "dinat_small", "dinat_base", "dinat_large")
        ]
    assert scaled == [False, True, True, False, True, False]


def released(model: nn.Module, levels: str) -> dict[str, Tensor]:
    """Our weights under the keys of a release."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("stages."):
            index, rest = key.removeprefix("stages.").split(".", 1)
            key = f"{levels}.{int(index) - rest.startswith('downsample')}.{rest}"
        key = key.replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2").replace("head.fc.", "head.")
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("name", "levels", "options"),
    [("nat_small", "levels", {"init_values": 1e-5}), ("dinat_s_tiny", "layers", {})],
)
def test_released_layouts_load(name: str, levels: str, options: dict[str, float]) -> None:
    model = timm.create_model(name, **SMALL, **options)
    state = released(model, levels)
    assert f"{levels}.0.downsample.reduction.weight" in state
    for checkpoint in (state, {"model": state}, {"state_dict": state}, model.state_dict()):
        converted = checkpoint_filter_fn(dict(checkpoint), model)  # type: ignore[arg-type]
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


def test_weights_of_another_model_are_refused() -> None:
    model = timm.create_model("nat_mini", **SMALL)
    state = released(model, "levels")
    del state["levels.0.blocks.0.attn.rpb"]
    with pytest.raises(VizattnError, match=r"1 missing \(stages.0.blocks.0.attn.rpb\)"):
        checkpoint_filter_fn(state, model)


def test_patch_merging_takes_pixels_down_before_right() -> None:
    model = timm.create_model("dinat_s_tiny", **SMALL)
    merging = model.stages[1].downsample
    merging.norm = nn.Identity()
    merging.reduction = nn.Identity()
    x = torch.arange(6.0).view(1, 1, 2, 3)
    expected = torch.tensor([[[0.0, 3, 1, 4], [2, 5, 0, 0]]])
    torch.testing.assert_close(merging(x).permute(0, 2, 3, 1)[0], expected)


def test_stride_causal_axes_and_no_bias() -> None:
    model = timm.create_model("nat_mini", **SMALL, stride=2, is_causal=(True, False), rel_pos_bias=False)
    assert not any("rpb" in key for key in model.state_dict())
    model(torch.randn(1, 3, 40, 36)).sum().backward()
    attention = model.stages[0].blocks[0].attn
    assert isinstance(attention, NeighborhoodAttention)
    x = torch.randn(1, 30, 16)
    changed = x.clone()
    changed[:, 24:] += 1  # the last row
    torch.testing.assert_close(attention(x, (5, 6))[:, :24], attention(changed, (5, 6))[:, :24])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilations": (1, 2, 3)}, "dilations must have one entry for each of the 2 stages, not 3"),
        ({"num_heads": (1,)}, "num_heads must have one entry for each of the 2 stages, not 1"),
        ({"stem_stride": 3}, "stem_stride must be 2 or 4, not 3"),
        ({"kernel_size": 1}, "kernel_size must be at least 2, not 1"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        timm.create_model("nat_mini", **SMALL | options)
