"""Segmenters of every family and of timm's models: shapes, gradients, padding, and the ways they are run."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, create, images
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn

import vizattn
from vizattn import Segmenter, VizattnError
from vizattn.heads import HEADS

CLASSES = 5
#: Options that make a head small.
SMALL: dict[str, dict] = {
    "fcn": {"dim": 8},
    "linear": {},
    "semantic_fpn": {"fpn_dim": 16, "dim": 8},
    "setr_pup": {"dim": 8},
    "upernet": {"dim": 8},
}
#: timm's models that are no family of ours: names and what makes them small.
TIMM: dict[str, dict] = {
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "embed_dim": 12, "depths": (1, 1, 1, 1), "strict_img_size": False},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3, "dynamic_img_size": True},
    "convnext_atto": {},
    "hrnet_w18_small": {},
}


class FourConvolutions(nn.Module):
    """A backbone that is traced fast: maps of strides 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, k, k) for i, o, k in ((3, 6, 4), (6, 8, 2), (8, 10, 2), (10, 12, 2))
        )
        rows = [{"num_chs": 6 + 2 * i, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i in range(4)]
        self.feature_info = FeatureInfo(rows, (0, 1, 2, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def small_segmenter(head: str) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(FourConvolutions(), CLASSES, head=head, auxiliary=True, **SMALL[head]).eval()


def segmenter(family: str, head: str, *, auxiliary: bool = True) -> Segmenter:
    backbone = create(family, features_only=True)
    torch.manual_seed(1)
    return Segmenter(backbone, CLASSES, head=head, auxiliary=auxiliary, **SMALL[head]).eval()


def timm_segmenter(name: str, head: str, **kwargs: object) -> Segmenter:
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, **(TIMM[name] | kwargs))
    return Segmenter(backbone, CLASSES, head=head, auxiliary=True, **SMALL[head]).eval()


def check_shapes(model: Segmenter, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits, auxiliary = model.forward_auxiliary(images(size))
        assert logits.shape == (2, CLASSES, *(-(-side // model.stride) for side in size))
        assert torch.equal(model(images(size)), logits)
    stride = model.auxiliary_head.stride
    assert auxiliary is not None
    assert auxiliary.shape == (2, CLASSES, *(-(-side // stride) for side in size))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family: str, head: str) -> None:
    model = segmenter(family, head)
    for size in FAMILIES[family].sizes:
        check_shapes(model, size)


@pytest.mark.parametrize("head", ["linear", "semantic_fpn", "upernet"])
@pytest.mark.parametrize("name", TIMM)
def test_shapes_of_timm_models(name: str, head: str) -> None:
    model = timm_segmenter(name, head)
    for size in ((64, 96), (65, 77), (33, 100)):
        check_shapes(model, size)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("make", [lambda h: segmenter("biformer", h), lambda h: segmenter("vit", h)])
def test_gradients_reach_every_parameter(make, head: str) -> None:
    model = make(head).train()
    logits, auxiliary = model.forward_auxiliary(images((33, 45)))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().add(auxiliary.square().sum()).backward()
    names = [name for name, p in model.named_parameters() if not name.startswith("backbone.")]
    assert names
    gradients = {name: model.get_parameter(name).grad for name in names}
    assert not [name for name, g in gradients.items() if g is None or not g.abs().sum() > 0]


@pytest.mark.parametrize("head", HEADS)
def test_only_maps_that_are_read_are_normed(head: str) -> None:
    """Without an auxiliary head too, every parameter of the heads has a gradient, as DDP wants."""
    for family in ("nat", "vit"):
        model = segmenter(family, head, auxiliary=False).train()
        model(images((32, 32))).square().sum().backward()
        assert not [n for n, p in model.named_parameters() if "backbone." not in n and p.grad is None]


def test_a_pyramid_is_made_where_the_backbone_has_none() -> None:
    plain = segmenter("vit", "semantic_fpn")
    assert plain.neck is not None
    assert plain.neck.strides == [4, 8, 16, 32]
    assert segmenter("vit", "linear").neck is None
    assert segmenter("l2vit", "semantic_fpn").neck is None


def test_every_map_is_normed_once() -> None:
    model = segmenter("biformer", "linear")
    assert [type(norm) for norm in model.norms] == [LayerNorm2d] * 3
    for row in model.backbone.feature_info.info:
        row["normed"] = True
    again = Segmenter(model.backbone, CLASSES, head="linear")
    assert [type(norm) for norm in again.norms] == [nn.Identity] * 3
    maps = again.forward_features(images((32, 32)))
    assert all(torch.equal(a, b) for a, b in zip(maps, again.backbone(images((32, 32)))))


def test_the_same_is_built_again_and_loads_its_state() -> None:
    model = segmenter("nat", "upernet")
    config = json.loads(json.dumps(model.head_config))
    assert config == model.head_config
    other = Segmenter(copy.deepcopy(model.backbone), **config).eval()
    state = model.head_state()
    assert {f"backbone.{name}" for name in model.backbone.state_dict()} | set(state) == set(model.state_dict())
    assert not [name for name in state if name.startswith("backbone.")]
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    assert torch.equal(other(images((32, 32))), model(images((32, 32))))


@pytest.mark.parametrize("head", HEADS)
def test_images_do_not_see_each_other(head: str) -> None:
    model = segmenter("biformer", head).double()
    batch = images((33, 45), batch=3).double()
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]))


@pytest.mark.parametrize("head", HEADS)
def test_one_small_image_trains(head: str) -> None:
    """Maps of a single position, in batches of one, through every BatchNorm of a head."""
    torch.manual_seed(0)
    backbone = timm.create_model("convnext_atto", features_only=True)
    model = Segmenter(backbone, CLASSES, head=head, auxiliary=True, **SMALL[head]).train()
    logits, auxiliary = model.forward_auxiliary(images((32, 32), batch=1))
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "backbone." not in n)


def test_images_are_padded_for_foreign_backbones_only() -> None:
    image = images((65, 77))
    model = timm_segmenter("resnet18", "linear")
    with torch.no_grad():
        padded = model(F.pad(image, (0, 96 - 77, 0, 96 - 65)))
        assert torch.equal(model(image), padded[..., : -(-65 // 2), : -(-77 // 2)])
    assert segmenter("nat", "linear").divisor == 1
    assert timm_segmenter("vit_tiny_patch16_224", "linear").divisor == 16


def test_a_backbone_of_one_size() -> None:
    model = timm_segmenter("vit_tiny_patch16_224", "linear", dynamic_img_size=False, img_size=48)
    check_shapes(model, (48, 48))
    check_shapes(model, (17, 40))
    with pytest.raises(VizattnError, match=r"48x48 pixels, got 49x48.*dynamic_img_size=True"):
        model(images((49, 48)))


def test_a_classifier_is_no_backbone() -> None:
    with pytest.raises(VizattnError, match="features_only=True"):
        Segmenter(timm.create_model("resnet18"), CLASSES)


def test_maps_with_channels_last() -> None:
    """timm's Swin gives (B, H, W, C)."""
    model = timm_segmenter("swin_tiny_patch4_window7_224", "linear")
    maps = model.forward_features(images((32, 64)))
    assert [m.shape for m in maps] == [(2, 12 * 2**i, 8 // 2**i, 16 // 2**i) for i in range(4)]
    assert maps[0].is_contiguous(memory_format=torch.channels_last)  # no copy


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_feature_dictionaries_and_lists_are_the_same(name: str) -> None:
    class AsDict(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.inner, self.feature_info, self.output_fmt = backbone, backbone.feature_info, backbone.output_fmt

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {str(i): m for i, m in enumerate(self.inner(x))}

    model = timm_segmenter(name, "linear")
    wrapped = copy.deepcopy(model)
    wrapped.backbone = AsDict(wrapped.backbone)
    assert torch.equal(model(images((32, 32))), wrapped(images((32, 32))))


def test_adapters_come_before_the_head() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32, depth=4)
    vizattn.attach(backbone, "hst", widths=(8, 8, 16, 16), num_heads=(2, 2, 2, 2))
    model = Segmenter(backbone, CLASSES, **SMALL["semantic_fpn"]).train()
    assert model.neck is None
    assert model.stride == 4
    model(images((32, 32))).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("adapters" in name for name in trained)
    assert not [name for name in trained if model.get_parameter(name).grad is None]


@pytest.mark.parametrize("head", HEADS)
def test_autocast(head: str) -> None:
    model = segmenter("biformer", head).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, auxiliary = model.forward_auxiliary(images((33, 45)))
    assert logits.isfinite().all()
    (logits.float().square().mean() + auxiliary.float().square().mean()).backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "backbone." not in n)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(images((33, 45))).float()
    with torch.no_grad():
        exact = model(images((33, 45)))
    assert (low - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("head", HEADS)
def test_compile(head: str) -> None:
    model = small_segmenter(head).train()
    for module in model.modules():  # random numbers are drawn in another order
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    compiled = torch.compile(copy.deepcopy(model).forward_auxiliary, backend="aot_eager", fullgraph=True, dynamic=False)
    for found, expected in zip(compiled(images((65, 77))), model.forward_auxiliary(images((65, 77)))):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["nat", "vit"])
def test_compile_with_a_backbone(family: str) -> None:
    model = segmenter(family, "semantic_fpn")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images((33, 45))), model(images((33, 45))), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["nat", "vit"])
def test_export(family: str) -> None:
    model = segmenter(family, "semantic_fpn")
    program = torch.export.export(model, (images((33, 45)),))
    torch.testing.assert_close(program.module()(images((33, 45), seed=1)), model(images((33, 45), seed=1)))


@pytest.mark.parametrize("head", HEADS)
def test_export_with_open_sizes(head: str) -> None:
    """Height and width stay open in multiples of 32, from 64 on: maps of one position take other ways."""
    model = small_segmenter(head)
    side = {2: torch.export.Dim("h", min=2, max=9) * 32, 3: torch.export.Dim("w", min=2, max=9) * 32}
    program = torch.export.export(model, (images((64, 96)),), dynamic_shapes=(side,))
    for size in ((96, 64), (64, 160)):
        torch.testing.assert_close(program.module()(images(size)), model(images(size)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_fused_is_the_same_function(head: str) -> None:
    model = timm_segmenter("resnet18", head).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    image = images((32, 64)).double()
    with torch.no_grad():
        expected = model.forward_auxiliary(image)
        fused = vizattn.fuse(copy.deepcopy(model))
        for found, reference in zip(fused.forward_auxiliary(image), expected):
            torch.testing.assert_close(found, reference)
    heads = [*fused.decode_head.modules(), *fused.auxiliary_head.modules()]
    assert not [module for module in heads if isinstance(module, nn.BatchNorm2d)]
