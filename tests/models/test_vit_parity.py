"""The numbers of the ViT against timm's own class at random weights; recorded outputs are in `test_parity.py`."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from reference import load
from torch import Tensor, nn

from vizattn.models.vit import VisionTransformer, checkpoint_filter_fn

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def test_keys_are_those_of_timm_in_order() -> None:
    model = timm.create_model("vit_va_tiny_patch16_224", device="meta")
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == load("timm_vit_tiny_patch16_224")["keys"]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 4},
    "registers_no_embed_class": {"reg_tokens": 4, "no_embed_class": True},
    "avg": {"global_pool": "avg"},
    "avgmax": {"global_pool": "avgmax"},
    "max_norm_first": {"global_pool": "max", "fc_norm": False},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "no_class_token_registers": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "token_norm_after": {"fc_norm": True},
    "all_tokens": {"global_pool": "", "num_classes": 0},
    "layer_scale": {"init_values": 0.1},
    "pre_norm": {"pre_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "wide_mlp": {"mlp_ratio": 3.0},
}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1)


def pair(theirs: nn.Module, ours: nn.Module) -> tuple[nn.Module, nn.Module]:
    """timm's model with random weights and ours with the same, through our filter, in float64."""
    randomise(theirs)
    assert isinstance(ours, VisionTransformer)
    ours.load_state_dict(checkpoint_filter_fn({"state_dict": theirs.state_dict()}, ours), strict=True)
    return theirs.double().eval(), ours.double().eval()


def assert_same(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [theirs(inputs[0]), ours(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.pow(2).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-12)
    for (name, ours_p), (theirs_name, theirs_p) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert name == theirs_name
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_timm(variant: str) -> None:
    kwargs = SMALL | VARIANTS[variant]
    theirs, ours = pair(timm.models.VisionTransformer(**kwargs), VisionTransformer(**kwargs))
    assert_same(theirs, ours, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("size", [(24, 40), (30, 45), (33, 33)])
@pytest.mark.parametrize("variant", ["plain", "no_class_token", "registers_no_embed_class"])
def test_equals_timm_at_other_sizes(variant: str, size: tuple[int, int]) -> None:
    kwargs = SMALL | VARIANTS[variant]
    theirs, ours = pair(
        timm.models.VisionTransformer(**kwargs, dynamic_img_size=True, dynamic_img_pad=True),
        VisionTransformer(**kwargs),
    )
    assert_same(theirs, ours, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_equals_timm_by_name(size: str) -> None:
    kwargs = {"depth": 2, "img_size": 64, "num_classes": 7}
    theirs, ours = pair(
        timm.create_model(f"vit_{size}_patch16_224", **kwargs),
        timm.create_model(f"vit_va_{size}_patch16_224", **kwargs),
    )
    assert_same(theirs, ours, torch.randn(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_same_parameters_as_timm(size: str) -> None:
    theirs, ours = (timm.create_model(f"vit_{va}{size}_patch16_224", device="meta") for va in ("", "va_"))
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


def test_intermediates_equal_timm() -> None:
    kwargs = SMALL | {"reg_tokens": 2}
    theirs, ours = pair(timm.models.VisionTransformer(**kwargs), VisionTransformer(**kwargs))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for options in (
        {},
        {"norm": True, "indices": 1},
        {"indices": [0], "stop_early": True, "return_prefix_tokens": True},
        {"output_fmt": "NLC", "intermediates_only": True, "indices": [-1, 0]},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ):
        torch.testing.assert_close(
            ours.forward_intermediates(x, **options),
            theirs.forward_intermediates(x, **options),
            rtol=1e-10,
            atol=1e-12,
        )


def test_training_step_equals_timm_with_dropout_of_paths() -> None:
    """The random numbers are drawn in the same order, so even stochastic depth agrees."""
    kwargs = SMALL | {"drop_path_rate": 0.5, "depth": 4}
    theirs, ours = pair(timm.models.VisionTransformer(**kwargs), VisionTransformer(**kwargs))
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
