"""Probes trained side by side take the steps they take alone, and those of the engine's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vizattn
from vizattn.adapters import frozen_features, head_from_features
from vizattn.data.loader import EpochSampler
from vizattn.engine import train
from vizattn.engine.config import apply_overrides, resolve_config
from vizattn.engine.models import build_model
from vizattn.engine.optim import build_optimizer, build_schedule
from vizattn.engine.seeding import seed_from
from vizattn.engine.vtab.frozen import can_batch, inputs_of, put, right_answers, train_probes

TINY = {
    "name": "vit_va_nano_patch4_32",
    "pretrained": False,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear_probe": {},
    "efficient_probing": {"num_queries": 4},
    "efficient_probing with class token": {"num_queries": 2, "include_cls": True, "d_out": 2},
}
RATES = [(1e-2, 0.1), (3e-2, 0.0), (1e-3, 1e-2)]
CLASSES, LENGTH = 3, 22


def _config(optimizer: str, **more: Any) -> dict[str, Any]:
    recipe = {
        "model": dict(TINY),
        "data": {"batch_size": 8},
        "optimizer": {"name": optimizer, "lr": 1e-2},
        "schedule": {"epochs": 3, "warmup_epochs": 1},
        "seed": 5,
    }
    return resolve_config(apply_overrides(recipe, more))


def _model(name: str) -> nn.Module:
    torch.manual_seed(3)
    options = {key: value for key, value in TINY.items() if key != "name"}
    model = timm.create_model(str(TINY["name"]), num_classes=CLASSES, **options)
    vizattn.attach(model, name.split()[0], **ADAPTERS[name])
    return model.double().eval()


def _data(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = torch.randn(LENGTH, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return frozen_features(model, images), torch.arange(LENGTH) % CLASSES


def _alone(name: str, config: dict[str, Any], lr: float, decay: float) -> nn.Module:
    """One setting by torch's optimizer, timm's parameter groups and the model itself: the plain way."""
    model = _model(name)
    features, labels = _data(model)
    options = {"name": config["optimizer"]["name"], "momentum": 0.9, "layer_decay": None}
    optimizer = build_optimizer(model, lr=lr, weight_decay=decay, **options)
    length = -(-LENGTH // 8)
    schedulers = build_schedule(optimizer, lr=lr, length=length, **config["schedule"])
    sampler = EpochSampler(range(LENGTH), shuffle=True, seed=config["seed"])  # type: ignore[arg-type]
    model.train()
    for epoch in range(config["schedule"]["epochs"]):
        sampler.set_epoch(epoch)
        for indices in torch.tensor([*sampler]).split(8):
            loss = nn.functional.cross_entropy(head_from_features(model, features[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    return model.eval()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_side_by_side_equals_alone(name: str, optimizer: str) -> None:
    config = _config(optimizer)
    model = _model(name)
    features, labels = _data(model)
    inputs = inputs_of(model, features)
    params = train_probes(model, config, RATES, LENGTH, lambda indices: inputs[indices], labels)
    for place, (lr, decay) in enumerate(RATES):
        alone = _alone(name, config, lr, decay)
        put(model, params, place)
        for key, value in alone.state_dict().items():
            if value.is_floating_point():  # not the count of batches, which only momentum=None would read
                torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-10, atol=1e-10, msg=key)
        logits = head_from_features(alone, features)
        assert right_answers(params, inputs, labels)[place] == (logits.argmax(1) == labels).sum().item()


def test_a_setting_that_diverges_leaves_the_others_alone() -> None:
    config = _config("momentum")
    model = _model("efficient_probing")
    features, labels = _data(model)
    inputs = inputs_of(model, features)
    wild = train_probes(model, config, [RATES[0], (1e300, 0.0)], LENGTH, lambda i: inputs[i], labels)
    tame = train_probes(model, config, [RATES[0]], LENGTH, lambda i: inputs[i], labels)
    assert right_answers(wild, inputs, labels)[1] == -1
    for key, value in tame.items():
        torch.testing.assert_close(wild[key][0], value[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer.name": "lars"},
        {"optimizer.clip_grad": 1.0},
        {"optimizer.accumulate": 2},
        {"loss.mixup": 0.2},
        {"ema": {"decay": 0.9}},
        {"amp": "bf16"},
        {"data.augment": "light"},
        {"schedule.min_lr": 1e-5},
    ],
)
def test_what_only_the_engine_does_is_left_to_it(change: dict[str, Any]) -> None:
    model = _model("linear_probe")
    assert can_batch(model, _config("adamw"))
    assert not can_batch(model, _config("adamw", **change))


def test_what_drops_features_at_random_is_left_to_the_engine() -> None:
    model = timm.create_model(str(TINY["name"]), num_classes=CLASSES, drop_rate=0.5)
    vizattn.attach(model, "linear_probe")
    assert not can_batch(model, _config("adamw"))


def test_methods_that_change_features_are_left_to_the_engine() -> None:
    options = {key: value for key, value in TINY.items() if key != "name"}
    model = timm.create_model(str(TINY["name"]), num_classes=CLASSES, **options)
    vizattn.attach(model, "vpt", num_tokens=2)
    assert not can_batch(model, _config("adamw"))


def test_it_ends_where_the_engine_ends(image_folder: Path, tmp_path: Path) -> None:
    """The same recipe by `vizattn.engine.train`: the same batches, start, schedule and steps."""
    recipe = {
        "model": {"name": "vit_va_nano_patch4_32", "pretrained": True},
        "adapter": {"method": "efficient_probing", "num_queries": 4},
        "data": {"name": "folder", "root": str(image_folder), "batch_size": 7},
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"epochs": 3, "warmup_epochs": 1},
        "seed": 11,
    }
    result = train(recipe, work_dir=tmp_path / "run", quiet=True, device="cpu", report=False)
    config = resolve_config(recipe)
    seed_from(11, 3)
    model = build_model(config, 3).eval()
    from vizattn.engine.build import build_data, set_transforms
    from vizattn.engine.task import frozen_features_each

    data = build_data(config["data"])
    set_transforms(data, result.preprocessing, config)
    images = torch.stack([image for image, _ in data.splits["train"]])
    inputs = inputs_of(model, frozen_features_each(model, images))
    rates = [(1e-3, 0.0), (1e-2, 0.1)]
    labels = torch.tensor(data.splits["train"].labels)
    params = train_probes(model, config, rates, len(labels), lambda i: inputs[i], labels)
    put(model, params, 1)
    ended = result.model.state_dict()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Together: AdamW divides the few gradients that are rounding alone by their own size.
            assert (parameter - ended[name]).norm() < 3e-4 * ended[name].norm(), name
