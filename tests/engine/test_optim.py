"""Parameter groups, the schedule's shape, and accumulation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import vizattn
from vizattn import VizattnError
from vizattn.engine.ema import EmaHook
from vizattn.engine.optim import EpochOptimWrapper, build_optimizer, build_schedule

SETTINGS = {"name": "adamw", "lr": 0.1, "weight_decay": 0.05, "momentum": 0.9, "layer_decay": None}


def tiny(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    return timm.create_model(name, img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=3, **options)


def by_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_va_tiny_patch16_224"])
def test_layer_decay_falls_by_its_factor_from_layer_to_layer(name: str) -> None:
    model = tiny(name)
    groups = by_parameter(model, build_optimizer(model, **{**SETTINGS, "layer_decay": 0.5}))
    assert groups.keys() == dict(model.named_parameters()).keys()
    layers = ["head.weight", "blocks.2.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "blocks.0.mlp.fc1.weight"]
    rates = [groups[layer]["lr"] for layer in [*layers, "patch_embed.proj.weight"]]
    assert rates == pytest.approx([0.1 * 0.5**k for k in range(5)])
    assert groups["pos_embed"]["weight_decay"] == groups["cls_token"]["weight_decay"] == 0.0
    assert groups["blocks.1.norm1.weight"]["weight_decay"] == groups["head.bias"]["weight_decay"] == 0.0
    assert groups["blocks.1.attn.qkv.weight"]["weight_decay"] == 0.05


def test_only_what_trains_is_optimised() -> None:
    model = vizattn.attach(tiny("vit_va_tiny_patch16_224"), "vpt", num_tokens=2)
    groups = by_parameter(model, build_optimizer(model, **SETTINGS))
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    with pytest.raises(VizattnError, match=r"Nothing to train"):
        build_optimizer(model, **SETTINGS)


def test_lars_by_timms_name() -> None:
    optimizer = build_optimizer(tiny(), **{**SETTINGS, "name": "lars"})
    assert type(optimizer).__name__ == "Lars"


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_schedule_warms_up_linearly_and_falls_as_a_cosine(layer_decay: float | None) -> None:
    optimizer = build_optimizer(tiny(), **{**SETTINGS, "layer_decay": layer_decay})
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = build_schedule(optimizer, name="cosine", lr=0.1, min_lr=0.01, warmup_epochs=2, epochs=12, length=5)
    rates = []
    for _ in range(60):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        for scheduler in schedule:
            scheduler.step()
    for group, peak in enumerate(peaks):
        lr = [rate[group] for rate in rates]
        steps = [lr[k + 1] - lr[k] for k in range(9)]
        assert lr[0] > 0 and steps == pytest.approx([steps[0]] * 9)
        assert max(lr) == pytest.approx(peak)
        fall = [0.1 * peak + 0.9 * peak * (1 + math.cos(math.pi * k / 50)) / 2 for k in range(50)]
        assert lr[10:] == pytest.approx(fall)


def test_accumulation_over_uneven_groups_is_the_mean_gradient() -> None:
    # 5 iterations an epoch in groups of 2: steps after 2, 4, 5, and again in the next epoch.
    weight = nn.Parameter(torch.zeros(()))
    wrapper = EpochOptimWrapper(torch.optim.SGD([weight], lr=1.0), 2, None, 5)
    wrapper.initialize_count_status(nn.Identity(), 0, 10)
    values, seen = [1.0, 3.0, 5.0, 7.0, 11.0], []
    for value in values * 2:
        before = weight.item()
        wrapper.update_params(weight * value)
        seen.append(before - weight.item())
    assert seen == [0.0, 2.0, 0.0, 6.0, 11.0] * 2


def test_ema_is_the_recursion_with_a_rising_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    hook, expected = EmaHook(model, 0.5), 0.0
    for iteration in range(12):
        model.weight.data.fill_(float(iteration))
        hook.after_train_iter(SimpleNamespace(iter=iteration), 0)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        expected = decay * expected + (1 - decay) * iteration
    assert hook.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    hook.swap()
    assert model.weight.item() == pytest.approx(expected, rel=1e-6) and hook.averages["weight"].item() == 11.0
    hook.swap()
    assert model.weight.item() == 11.0


def test_heads_of_a_segmenter_learn_at_their_own_rate() -> None:
    backbone = timm.create_model("vit_va_nano_patch4_32", depth=4, features_only=True)
    model = vizattn.Segmenter(backbone, 3, head="linear")
    for layer_decay in (None, 0.5):
        optimizer = build_optimizer(
            model, name="adamw", lr=1e-3, weight_decay=0.1, momentum=0.9, layer_decay=layer_decay, head_lr_mult=10.0
        )
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(group_of) == sum(1 for _ in model.parameters())
        groups = {name: group_of[id(p)] for name, p in model.named_parameters()}
        assert groups["decode_head.convs.0.weight"]["lr"] == pytest.approx(1e-2)
        assert groups["backbone.model.pos_embed"]["weight_decay"] == 0.0
        assert groups["backbone.model.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
        first, last = (groups[f"backbone.model.blocks.{i}.attn.qkv.weight"]["lr"] for i in (0, 3))
        assert first == pytest.approx(last * (layer_decay or 1.0) ** 3)
