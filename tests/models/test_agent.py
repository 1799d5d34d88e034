"""What is special to the backbones of agent attention: released layouts, tables of positions at other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from families import create, images
from reference import load, weights
from torch import Tensor, nn

from vizattn import VizattnError
from vizattn.attention import AgentAttention, SoftmaxAttention, WindowAttention
from vizattn.cli.backbones import build_empty
from vizattn.models import agent_deit, agent_pvt, agent_swin

FAMILIES = ("agent_deit", "agent_pvt", "agent_swin")
RELEASES: dict[str, tuple[Any, str]] = {
    "agent_deit_tiny": (agent_deit, "deit_agent_tiny"),
    "agent_pvt_tiny": (agent_pvt, "agent_pvt_tiny"),
    "agent_swin_tiny": (agent_swin, "agent_swin_tiny"),
}
every_release = pytest.mark.parametrize("release", RELEASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def empty(name: str) -> Any:
    """A model without memory for its parameters."""
    return build_empty(name)


def attentions(model: Any) -> list[type[nn.Module]]:
    blocks = model.blocks if hasattr(model, "blocks") else [b for stage in model.stages for b in stage.blocks]
    return [type(block.attn) for block in blocks]


def filter_of(family: str) -> Any:
    return {"agent_deit": agent_deit, "agent_pvt": agent_pvt, "agent_swin": agent_swin}[family].checkpoint_filter_fn


@every_release
def test_released_weights_load_at_another_size_and_from_our_own_layout(release: str) -> None:
    module, name = RELEASES[release]
    state = {key: value.float() for key, value in weights(load(release)).items()}
    native = timm.create_model(name).eval()
    native.load_state_dict(module.checkpoint_filter_fn({"model": state, "epoch": 3}, native), strict=True)

    larger = timm.create_model(name, img_size=(64, 96)).eval()
    larger.load_state_dict(module.checkpoint_filter_fn({"model": dict(state)}, larger), strict=True)
    again = timm.create_model(name, img_size=(64, 96)).eval()
    again.load_state_dict(module.checkpoint_filter_fn(native.state_dict(), again), strict=True)
    x = images((64, 96))
    with torch.no_grad():
        expected = native(x)  # resizes its tables on the way
        torch.testing.assert_close(larger(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again(x), larger(x))


@every_family
def test_weights_move_between_oblong_sizes(family: str) -> None:
    wide = create(family, img_size=(16, 48))
    tall = create(family, img_size=(48, 16))
    tall.load_state_dict(filter_of(family)(wide.state_dict(), tall), strict=True)
    x = images((48, 16))
    with torch.no_grad():
        torch.testing.assert_close(tall(x), wide(x), rtol=1e-4, atol=1e-5)


@every_family
def test_set_input_size_equals_a_model_built_for_that_size(family: str) -> None:
    model: Any = create(family)
    model.set_input_size((40, 24))
    fresh = create(family, img_size=(40, 24))
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = images((40, 24))
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


@every_release
def test_weights_of_another_size_are_refused(release: str) -> None:
    module, name = RELEASES[release]
    case = load(release)
    state: dict[str, Tensor] = weights(case)
    dropped = next(key for key in state if key.endswith("attn.proj.weight"))
    del state[dropped]
    with pytest.raises(VizattnError, match=r"The weights do not fit this .*1 missing"):
        module.checkpoint_filter_fn(state, empty(name))
    small = {"agent_deit_tiny": "deit_agent_small", "agent_pvt_tiny": "agent_pvt_small"}
    with pytest.raises(VizattnError, match="do not fit"):
        module.checkpoint_filter_fn(weights(case), empty(small.get(release, "agent_swin_small")))


def test_tables_that_a_swin_release_computes_are_left_out() -> None:
    case, model = load("agent_swin_tiny"), timm.create_model("agent_swin_tiny")
    computed = {f"layers.3.blocks.{i}.attn.relative_position_index": torch.zeros(49, 49) for i in range(2)}
    masks = {"layers.2.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    state = agent_swin.checkpoint_filter_fn({**weights(case), **computed, **masks}, model)
    model.load_state_dict(state, strict=True)


def test_which_blocks_attend_by_agents() -> None:
    assert attentions(empty("deit_agent_base")) == [AgentAttention] * 4 + [SoftmaxAttention] * 8
    assert attentions(empty("agent_pvt_tiny")) == [AgentAttention] * 8
    assert attentions(empty("agent_swin_tiny")) == [AgentAttention] * 10 + [WindowAttention] * 2
    assert attentions(empty("agent_swin_small")) == [AgentAttention] * 4 + [WindowAttention] * 20
    base = empty("agent_swin_base")
    assert attentions(base) == [AgentAttention] * 6 + [WindowAttention] * 18
    assert [block.attn.shift for block in base.stages[2].blocks[2:6]] == [False, True, False, True]


def test_every_token_sees_the_whole_map() -> None:
    for family in FAMILIES:
        model: Any = create(family).double()
        x = images((32, 32), batch=1).double()
        first = model.blocks[0] if family == "agent_deit" else model.stages[0].blocks[0]
        outputs: list[Tensor] = []
        first.register_forward_hook(lambda _module, _inputs, output, outputs=outputs: outputs.append(output))
        changed = x.clone()
        changed[:, :, -2:, -2:] += 1
        model(x), model(changed)
        assert (outputs[0] != outputs[1]).any(dim=2).all()


def test_lists_must_fit_each_other() -> None:
    with pytest.raises(VizattnError, match="need an entry for each stage, not 4, 3, 4, 4, 4"):
        agent_pvt.AgentPVT(depths=(1, 1, 1))
    with pytest.raises(VizattnError, match="need an entry for each stage, not 4, 4, 4, 2"):
        agent_swin.AgentSwin(num_agents=(9, 16))


def test_the_deit_draws_its_tables_anew() -> None:
    model = empty("deit_agent_nano_patch4_32").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.015 < model.blocks[0].attn.an_bias.std() < 0.025
