"""Folding norms into convolutions: the same function with fewer operations, for every family."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from families import FAMILIES, create, images
from timm.layers import ConvNormAct
from torch import nn

import vizattn
from vizattn import VizattnError
from vizattn.layers import ConvNorm

every_family = pytest.mark.parametrize("family", FAMILIES)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def disturb(module: nn.Module) -> nn.Module:
    """Statistics and weights away from their initial values, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.normal_()
    return module.eval()


@every_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["f32", "f64"])
def test_fused_equals_unfused(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model, fused = create(family).to(dtype), vizattn.fuse(create(family).to(dtype))
    for size in FAMILIES[family].sizes:
        x = images(size).to(dtype)
        with torch.no_grad():
            expected, features = model(x), model.forward_features(x)
            torch.testing.assert_close(fused(x), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(fused.forward_features(x), features, rtol=tolerance, atol=tolerance)
    before, after = model.state_dict(), fused.state_dict()
    if not norms(model):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@every_family
def test_fused_models_are_saved_and_exported(family: str) -> None:
    size = FAMILIES[family].sizes[0]
    model, other = vizattn.fuse(create(family)), vizattn.fuse(create(family))
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = images(size)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["efficientvit"])
def test_no_norm_is_left(family: str) -> None:
    model = create(family)
    assert norms(model)
    assert not norms(vizattn.fuse(model))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (2, 4, 7, 7)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6, affine=False)), (2, 4, 7, 7)),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (5, 4)),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)), (5, 4)),
        (nn.Sequential(ConvNorm(4, 8, 3, stride=2, groups=4, bias=True), nn.GELU()), (2, 4, 7, 7)),
        (ConvNormAct(4, 8, 3, act_layer=nn.SiLU), (2, 4, 7, 7)),
        (ConvNormAct(4, 8, 1, apply_act=False), (2, 4, 7, 7)),
    ],
    ids=["conv-norm", "no-affine", "norm-linear", "norm-linear-without-bias", "ConvNorm", "ConvNormAct", "without-act"],
)
def test_patterns(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = disturb(module.double())
    x = torch.randn(shape, dtype=torch.float64)
    expected = module(x)
    fused = vizattn.fuse(module)
    assert not norms(fused)
    torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-10)


class Standardised(nn.Conv2d):
    """Its weight is changed on the way, so nothing may be folded into it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(Standardised(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
    ids=["subclass", "not-adjacent", "batch-statistics"],
)
def test_what_cannot_be_folded_stays(module: nn.Module) -> None:
    module = disturb(module)
    x = torch.randn(2, 4, 5, 5)
    expected = module(x)
    assert len(norms(vizattn.fuse(module))) == 1
    assert torch.equal(module(x), expected)


def test_half_precision_is_kept() -> None:
    model = vizattn.fuse(create("efficientvit").bfloat16())
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


def test_frozen_layers_stay_frozen() -> None:
    model = vizattn.fuse(create("efficientvit").requires_grad_(False))
    assert not any(p.requires_grad for p in model.parameters())


def test_training_mode_is_refused() -> None:
    with pytest.raises(VizattnError, match="training mode"):
        vizattn.fuse(create("efficientvit").train())


def test_adapters_are_refused() -> None:
    model = timm.create_model("vit_va_nano_patch4_32", depth=1)
    vizattn.attach(model, "vpt", num_tokens=2)
    with pytest.raises(VizattnError, match=r"with adapters \(vpt\): call vizattn.merge or vizattn.detach"):
        vizattn.fuse(model.eval())
    with vizattn.disabled(model), pytest.raises(VizattnError, match=r"adapters are disabled: leave vizattn.disabled"):
        vizattn.fuse(model)
    assert [a.method for a in vizattn.adapters.attached(model)] == ["vpt"]


def test_patches_that_fill_up_the_map_still_do() -> None:
    model = timm.create_model("biformer_stl", embed_dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), num_classes=3)
    disturb(model).double()
    x = images((50, 33)).double()
    with torch.no_grad():
        expected = model.forward_features(x)
        torch.testing.assert_close(vizattn.fuse(model).forward_features(x), expected, rtol=1e-9, atol=1e-9)
    assert len(norms(model)) == 1
