"""Training from stored features is training from images, bit for bit; what is stored is checked and keyed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import vizattn
from vizattn.data import build_dataset, build_transforms, transform_identity
from vizattn.engine import train
from vizattn.engine.features import FeatureDataset, cache_folder, cached_features, feature_key
from vizattn.engine.task import frozen_features_each


def bundle_weights(work_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(work_dir / "bundle" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("adapter", "amp"),
    [
        ({"method": "linear_probe"}, None),
        ({"method": "efficient_probing", "num_queries": 2}, None),
        ({"method": "linear_probe"}, "bf16"),
    ],
)
def test_cached_is_uncached_bit_for_bit(
    adapter_recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any], amp: str | None
) -> None:
    recipe = adapter_recipe | {"schedule": {"epochs": 2}} | {"adapter": adapter, "amp": amp}
    uncached = train({**recipe, "cache_features": False}, work_dir=tmp_path / "uncached", quiet=True)
    assert not cache_folder().exists()
    cached = train(recipe, work_dir=tmp_path / "cached", quiet=True)
    assert len(list(cache_folder().glob("*.npy"))) == 2
    again = train({**recipe, "data": {**recipe["data"], "batch_size": 6}}, work_dir=tmp_path / "again", quiet=True)
    expected = bundle_weights(tmp_path / "uncached")
    for run in ("cached", "again"):
        ours = bundle_weights(tmp_path / run)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert cached.metrics == uncached.metrics == again.metrics


def test_random_transforms_and_mixing_are_never_cached(adapter_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = adapter_recipe | {"adapter": {"method": "linear_probe"}, "schedule": {"epochs": 1}}
    train({**recipe, "data": {**recipe["data"], "augment": "light"}}, work_dir=tmp_path / "light", quiet=True)
    train({**recipe, "loss": {"mixup": 0.2}}, work_dir=tmp_path / "mixup", quiet=True)
    assert not cache_folder().exists()


def test_features_do_not_depend_on_the_batch() -> None:
    model = _probe()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = frozen_features_each(model, images)
    assert torch.equal(together, torch.cat([frozen_features_each(model, images[i : i + 1]) for i in range(5)]))
    torch.set_num_threads(2)
    assert torch.equal(together[[3, 1]], frozen_features_each(model, images[[3, 1]]))
    assert torch.get_num_threads() == 2


def _probe() -> Any:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return vizattn.attach(timm.create_model("vit_va_nano_patch4_32", num_classes=3, **sizes), "linear_probe")


def _stored(image_folder: Path, folder: Path) -> tuple[FeatureDataset, Path]:
    model = _probe()
    transform = build_transforms({"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}, train=False)
    dataset: Any = build_dataset("folder", "train", root=str(image_folder), transform=transform)
    key = feature_key(
        model, dataset, level="pooled", transform=transform_identity(transform), amp=False, model_args=None
    )
    stored = cached_features(
        model,
        dataset,
        key,
        amp=False,
        batch_size=8,
        num_workers=0,
        folder=folder,
        description="features",
        display="quiet",
        logger=logging.getLogger("test"),
    )
    return stored, folder / f"{key}.npy"


@pytest.mark.parametrize("damage", ["flip", "truncate", "note", "half", "label", "list"])
def test_a_damaged_cache_is_noticed_and_rebuilt(image_folder: Path, tmp_path: Path, damage: str) -> None:
    stored, path = _stored(image_folder, tmp_path)
    expected = [stored[i] for i in range(len(stored))]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-100])
    elif damage == "note":
        path.with_suffix(".json").write_text("{")
    elif damage == "label":
        saved = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(saved | {"labels": [7, *saved["labels"][1:]]}))
    elif damage == "list":
        path.with_suffix(".json").write_text("[1]")
    else:
        path.with_suffix(".json").unlink()
    again, _ = _stored(image_folder, tmp_path)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(expected, [again[i] for i in range(30)]))
    assert json.loads(path.with_suffix(".json").read_text())["labels"] == [label for _, label in expected]


def test_a_whole_cache_is_not_computed_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stored(image_folder, tmp_path)

    def fail(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("vizattn.engine.features.frozen_features_each", fail)
    stored, _ = _stored(image_folder, tmp_path)
    assert len(stored) == 30


def test_the_key_changes_with_what_features_depend_on(image_folder: Path) -> None:
    model = _probe()
    datasets: list[Any] = [build_dataset("folder", split, root=str(image_folder)) for split in ("train", "val")]
    base = {"level": "pooled", "transform": "t", "amp": False, "model_args": {"name": "a"}}
    keys = [feature_key(model, datasets[0], **base), feature_key(model, datasets[1], **base)]
    for change in ({"level": "tokens"}, {"transform": "u"}, {"amp": True}, {"model_args": {"name": "b"}}):
        keys.append(feature_key(model, datasets[0], **{**base, **change}))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 1
    keys.append(feature_key(model, datasets[0], **base))
    assert len(set(keys)) == len(keys) == 7
    model.head.weight.data += 1  # trained, not frozen
    assert feature_key(model, datasets[0], **base) == keys[-1]
