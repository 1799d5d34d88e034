"""Pretrained weights of the ViT: from a packaged file, adapted as timm does, refused by name when they do not fit."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

import vizattn
from vizattn import VizattnError
from vizattn.models.vit import SIZES, VisionTransformer, checkpoint_filter_fn

NANO = "vit_va_nano_patch4_32"
PACKAGED = Path(vizattn.__file__).parent / "weights" / f"{NANO}.safetensors"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Random weights for a nano of two blocks, in half precision as in the package."""
    model = timm.create_model(NANO, depth=2)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator).half() for key, value in model.state_dict().items()}


@pytest.fixture
def file(weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The weights in a file, and no network."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    save_file(weights, tmp_path / "nano.safetensors")
    return str(tmp_path / "nano.safetensors")


def load(file: str, **kwargs: Any) -> VisionTransformer:
    return timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={"file": file}, **{"depth": 2} | kwargs)


def test_half_precision_is_cast_on_loading(file: str, weights: dict[str, Tensor]) -> None:
    for key, value in load(file).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights[key].float()), key
    assert load(file, dtype=torch.float64).pos_embed.dtype == torch.float64


def test_packaged_file_is_found_beside_the_package() -> None:
    cfg = timm.get_pretrained_cfg(NANO)
    assert cfg is not None and cfg.file == str(PACKAGED)
    assert cfg.tag == "glyphs"
    assert not cfg.hf_hub_id and not cfg.url


@pytest.mark.skipif(not PACKAGED.exists(), reason="the packaged weights are not built yet")
def test_packaged_weights_load_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)
    model = timm.create_model(NANO, pretrained=True).eval()
    assert PACKAGED.stat().st_size <= 2.5e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(model.head.weight, timm.create_model(NANO).head.weight)


def test_missing_file_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(VizattnError, match=r"'vit_va_nano_patch4_32' .*gone\.safetensors\. There is no such file"):
        load(str(gone))
    timm.create_model(NANO, pretrained=False, pretrained_cfg_overlay={"file": str(gone)})


def test_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=OSError("No connection.")))
    message = r"vit_va_tiny_patch16_224\.augreg_in21k cannot be fetched\. timm/vit_tiny.*: No connection\."
    with pytest.raises(VizattnError, match=message):
        timm.create_model("vit_va_tiny_patch16_224.augreg_in21k", pretrained=True, depth=1, num_classes=2)


def test_other_number_of_classes(file: str, weights: dict[str, Tensor]) -> None:
    model = load(file, num_classes=10)
    assert model.head.weight.shape == (10, 96)
    assert torch.equal(model.norm.weight, weights["norm.weight"].float())
    assert load(file, num_classes=0)(torch.randn(1, 3, 32, 32)).shape == (1, 96)


def test_other_channels(file: str, weights: dict[str, Tensor]) -> None:
    """One channel sees the sum over the colours, as timm defines it."""
    kernel = load(file, in_chans=1).patch_embed.proj.weight
    torch.testing.assert_close(kernel, weights["patch_embed.proj.weight"].float().sum(1, keepdim=True))


@pytest.mark.parametrize("img_size", [64, (48, 20), (64, 16)])
def test_other_native_size(file: str, weights: dict[str, Tensor], img_size: Any) -> None:
    model = load(file, img_size=img_size)
    expected = resample_abs_pos_embed(weights["pos_embed"].float(), list(model.patch_embed.grid_size), [8, 8])
    assert torch.equal(model.pos_embed, expected)


def test_other_patch_size(file: str, weights: dict[str, Tensor]) -> None:
    model = load(file, patch_size=8)
    assert torch.equal(
        model.patch_embed.proj.weight,
        resample_patch_embed(weights["patch_embed.proj.weight"].float(), [8, 8]),
    )
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(weights["pos_embed"].float(), [4, 4], [8, 8]))


def test_all_changes_at_once(file: str) -> None:
    model = load(file, patch_size=8, img_size=(40, 64), in_chans=4, num_classes=3)
    assert model(torch.randn(2, 4, 40, 64)).shape == (2, 3)


def test_features_only(file: str, weights: dict[str, Tensor]) -> None:
    model = load(file, features_only=True, out_indices=(0, 1))
    assert torch.equal(model.model.blocks[1].mlp.fc2.weight, weights["blocks.1.mlp.fc2.weight"].float())
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 30, 30))] == [(1, 96, 8, 8)] * 2


@pytest.mark.parametrize("nest", [("model",), ("state_dict",), ("model", "state_dict")])
def test_nested_checkpoints(weights: dict[str, Tensor], nest: tuple[str, ...]) -> None:
    checkpoint: dict[str, Any] = dict(weights)
    for key in reversed(nest):
        checkpoint = {key: checkpoint, "epoch": 3}
    model = timm.create_model(NANO, depth=2)
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)
    assert torch.equal(model.head.bias, weights["head.bias"].float())


def test_rectangular_source_grid(weights: dict[str, Tensor]) -> None:
    """The weights of a model for 16 x 32 images keep their grid of 4 x 8 when their configuration tells the size."""
    source = timm.create_model(NANO, depth=2, img_size=(16, 32))
    source.load_state_dict(weights | {"pos_embed": torch.randn(1, 33, 96)})
    model = timm.create_model(NANO, depth=2, pretrained_cfg_overlay={"input_size": (3, 16, 32)}, img_size=(32, 16))
    loaded = checkpoint_filter_fn(source.state_dict(), model)
    assert torch.equal(loaded["pos_embed"], resample_abs_pos_embed(source.pos_embed.detach(), [8, 4], [4, 8]))


@pytest.mark.parametrize("num_classes", [52, 10])
def test_what_does_not_fit_is_named(weights: dict[str, Tensor], num_classes: int, tmp_path: Path) -> None:
    """Also when the number of classes differs: timm then loads loosely and would leave what is missing at random."""
    wrong = dict(weights)
    del wrong["blocks.1.attn.qkv.weight"], wrong["norm.bias"]
    wrong["blocks.7.norm1.bias"] = torch.zeros(96)
    wrong["blocks.0.mlp.fc1.bias"] = torch.zeros(100)
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(VizattnError) as caught:
        load(str(tmp_path / "wrong.safetensors"), num_classes=num_classes)
    assert str(caught.value) == (
        "The weights do not fit this VisionTransformer: 2 missing (blocks.1.attn.qkv.weight, norm.bias); "
        "1 unexpected (blocks.7.norm1.bias); "
        "1 of another shape (blocks.0.mlp.fc1.bias (100,) instead of (384,))."
    )


def test_other_prefix_tokens_are_named(file: str) -> None:
    with pytest.raises(VizattnError, match="has 65 rows, which is not 5 prefix tokens and a square grid"):
        load(file, reg_tokens=4)


def test_only_nano_ships_its_weights() -> None:
    for name in SIZES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        assert bool(cfg.file) == (name == NANO)
        assert cfg.file or cfg.hf_hub_id == f"timm/{name.replace('vit_va_', 'vit_')}.{cfg.tag}"


def test_own_weights_of_an_oblong_native_size_load_again() -> None:
    source, target = (timm.create_model(NANO, depth=2, img_size=(24, 40)).eval() for _ in range(2))
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)
    assert torch.equal(target.pos_embed, source.pos_embed)
