"""The maps of whole models: their weights make what the layers really give, with adapters and without."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import rows
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

import vizattn
from vizattn import VizattnError
from vizattn.adapters import query_maps
from vizattn.adapters.anatomy import describe
from vizattn.attention.maps import AttentionMap

CASES = [
    *((model, None) for model in rows.MODELS),
    *((model, "vpt_deep") for model in ("vit", "dinov3", "beit", "eva02", "swin", "vit_attentions", "biformer", "nat")),
    *((model, "vpt_deep") for model in ("agent_swin", "agent_cswin", "l2vit")),
    *((model, "vpt_shallow") for model in ("vit", "dinov3", "beit", "vit_attentions", "siglip")),
    *((model, "hst") for model in ("vit_va", "eva02")),
    *((model, "apla") for model in ("vit", "swinv2", "halonet", "efficientvit", "nat")),
    *(
        (model, "efficient_probing")
        for model in ("vit_va", "deit_distilled", "siglip", "swin", "halonet", "efficientvit")
    ),
]


def silence_convolutions(model: nn.Module) -> None:
    """Those beside an attention, which are added to what its weights mix."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and any(part in name.split(".") for part in ("dwc", "lepe", "lepes")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def watch(model: nn.Module, maps: list[AttentionMap], images: Tensor) -> dict[str, Tensor]:
    """What the heads of each attention give in a forward of the tests' own, as (B, queries, h * e)."""
    seen: dict[str, Tensor] = {}
    handles = []
    for attention in maps:
        module: Any = model.get_submodule(attention.name)
        block: Any = model.get_submodule(attention.name.rpartition(".")[0])

        def tokens(_: nn.Module, args: tuple[Tensor, ...], name: str = attention.name) -> None:
            seen[name] = args[0]

        def windows(_: nn.Module, args: tuple[Tensor, ...], block: Any = block, a: AttentionMap = attention) -> None:
            size = block.window_size
            height, width = (-(-length // s) * s for length, s in zip(a.grid, size))
            x = window_reverse(args[0].unflatten(1, tuple(size)), size, height, width)
            x = x[:, : a.grid[0], : a.grid[1]].roll(tuple(block.shift_size), (1, 2))
            seen[a.name] = x.flatten(1, 2)

        def output(_: nn.Module, args: Any, out: Tensor, a: AttentionMap = attention) -> None:
            seen[a.name] = out.flatten(2).transpose(1, 2) if out.ndim == 4 else out[:, None]

        if isinstance(block, SwinTransformerBlock | SwinTransformerV2Block):
            handles.append(module.proj.register_forward_pre_hook(windows))
        elif attention.kind == "probe" or not hasattr(module, "proj"):
            handles.append(module.register_forward_hook(output))
        else:
            handles.append(module.proj.register_forward_pre_hook(tokens))
    model(images)
    for handle in handles:
        handle.remove()
    return {name: x.flatten(2).transpose(1, 2) if x.ndim == 4 else x for name, x in seen.items()}


def check(model: nn.Module, images: Tensor) -> list[AttentionMap]:
    with torch.no_grad():
        maps = vizattn.attention_maps(model, images)
        given = watch(model, maps, images)
        for attention in maps:
            weights = attention.weights()
            mixed = (weights @ attention.values).transpose(1, 2).flatten(2)
            if attention.kind == "probe":  # each query its own share
                mixed = mixed.flatten(1)[:, None]
            if attention.kind == "cascade":  # a ReLU comes before the projection
                mixed = mixed.relu()
            module: Any = model.get_submodule(attention.name)
            mixed = getattr(module, "norm", nn.Identity())(mixed) if attention.kind == "softmax" else mixed
            torch.testing.assert_close(mixed, given[attention.name], rtol=1e-9, atol=1e-9)
            if attention.kind != "linear":
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    return maps


@pytest.mark.parametrize(("model", "method"), CASES)
def test_weights_mix_to_what_the_layers_give(model: str, method: str | None) -> None:
    net = rows.create(model).double()
    depth = len(describe(net).blocks)
    if method:
        torch.manual_seed(5)
        vizattn.attach(net, rows.METHODS[method][0], **rows.METHODS[method][1])
        rows.randomise(net.double())
    silence_convolutions(net)
    maps = check(net, rows.images().double())
    assert len([m for m in maps if m.query_grid != (0, 0)]) == depth
    if method == "vpt_deep":
        assert all(m.keys >= m.prefix + m.grid[0] * m.grid[1] + 3 for m in maps)
    if method == "efficient_probing":
        torch.testing.assert_close(maps[-1].of_token(), query_maps(net, rows.images().double()))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_sizes_that_do_not_divide(family: str) -> None:
    model = families.create(family).double()
    silence_convolutions(model)
    maps = check(model, families.images((33, 45)).double())
    assert all(m.grid[0] < m.grid[1] for m in maps[:2])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin_attends_to_the_padding_of_its_windows(name: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    model = timm.create_model(name, img_size=(20, 24), patch_size=2, num_classes=3, **sizes).eval().double()
    nn.init.normal_(model.layers[0].blocks[0].attn.qkv.weight)
    maps = check(model, torch.randn(2, 3, 20, 24, dtype=torch.float64))
    assert maps[0].keys == 12 * 12  # 10 x 12 and the padding
    assert float(maps[0].weights()[..., 120:].sum()) > 0.1
    assert float(maps[0].of_query(3, 3)[..., 4:, :].max()) == 0.0  # another window


@pytest.mark.parametrize("model", ["vit", "vit_attentions", "swin", "efficientvit", "halonet"])
def test_normal_forwards_do_not_change(model: str) -> None:
    net = rows.create(model)
    vizattn.attach(net, "efficient_probing", num_queries=4)
    net.train()
    net.eval()
    net.adapters.train()  # mixed modes come back as they were
    before = net(rows.images())
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    attributes = [sorted(vars(m)) for m in net.modules()]

    maps = vizattn.attention_maps(net, rows.images())
    maps[0].mean_received()
    assert [m.training for m in net.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert [sorted(vars(m)) for m in net.modules()] == attributes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items() if "running" not in key)
    net.load_state_dict(state)
    assert torch.equal(net(rows.images()), before)


def test_nothing_is_left_behind_by_a_forward_that_fails() -> None:
    net = rows.create("vit")
    vizattn.attach(net, "efficient_probing", num_queries=4)
    attributes = [sorted(vars(m)) for m in net.modules()]
    with pytest.raises(Exception, match=r"size|channels|shape"):
        vizattn.attention_maps(net, torch.randn(1, 7, 32, 32))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert [sorted(vars(m)) for m in net.modules()] == attributes


def test_weights_wait_until_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    softmax = Tensor.softmax
    maps = vizattn.attention_maps(rows.create("vit"), rows.images())
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: calls.append(tuple(x.shape)) or softmax(x, dim))
    maps[0].of_query(1, 2)
    assert calls == [(2, 3, 1, 17)]


def test_one_image_without_batch() -> None:
    net = rows.create("nat")
    one, two = (vizattn.attention_maps(net, x) for x in (rows.images()[0], rows.images()))
    assert one[0].batch == 1
    torch.testing.assert_close(one[1].of_query(3, 2), two[1].of_query(3, 2)[:1])


@pytest.mark.parametrize("method", [None, "vpt_deep", "efficient_probing"])
@pytest.mark.parametrize("model", ["vit", "nat", "swin"])
def test_segmenters_and_models_that_give_maps(model: str, method: str | None) -> None:
    maps = vizattn.attention_maps(rows.create_maps(model, method), rows.images())
    assert {m.kind for m in maps} >= {"nat": {"neighborhood"}, "swin": {"window"}, "vit": {"softmax"}}[model]
    if method:
        segmenter = rows.create_segmenter(model, method)
        again = vizattn.attention_maps(segmenter.eval(), rows.images())
        assert [m.name for m in again] == [m.name for m in maps]
        assert (again[-1].kind == "probe") == (method == "efficient_probing")


def test_disabled_adapters_leave_no_trace_in_the_maps() -> None:
    net = rows.create("vit")
    plain = vizattn.attention_maps(net, rows.images())[1].weights()
    vizattn.attach(net, "vpt", num_tokens=3)
    with vizattn.disabled(net):
        torch.testing.assert_close(vizattn.attention_maps(net, rows.images())[1].weights(), plain)
    assert vizattn.attention_maps(net, rows.images())[1].keys == plain.shape[-1] + 3


#: Parts of timm's that few models have.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed rotations": ("vit_small_patch16_rope_mixed_224", {}),
    "rotations and absolute positions": ("vit_small_patch16_rope_ape_224", {}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "normed heads": ("eva02_tiny_patch14_224", {"scale_attn_inner": True}),
    "normed queries": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "one bias for all blocks": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    "convolutional stem": ("vit_tiny_r_s16_p8_224", {"patch_size": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_timm(variant: str) -> None:
    torch.manual_seed(0)
    name, options = VARIANTS[variant]
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 4}
    model = timm.create_model(name, **{**sizes, **options}).eval().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    check(model, rows.images().double())
    assert vizattn.relevance(model, rows.images().double()).shape[0] == 2


@pytest.mark.parametrize("family", [*families.FAMILIES, "swin", "swinv2", "eva02", "beit"])
def test_bfloat16(family: str) -> None:
    model = families.create(family) if family in families.FAMILIES else rows.create(family)
    images = families.images((32, 32))
    exact = vizattn.attention_maps(model, images)
    for maps in (
        vizattn.attention_maps(copy.deepcopy(model).bfloat16(), images.bfloat16()),
        under_autocast(model, images),
    ):
        for rough, fine in zip(maps, exact, strict=True):
            weights, expected = rough.weights().float(), fine.weights()
            if rough.kind not in ("routing", "linear"):  # another choice of regions, another scale
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=0.02, atol=0.02)
            assert (weights - expected).abs().mean() < 0.2 * expected.abs().mean()


def under_autocast(model: nn.Module, images: Tensor) -> list[AttentionMap]:
    with torch.autocast("cpu", torch.bfloat16):
        return vizattn.attention_maps(model, images)


@pytest.mark.parametrize(
    "compiled", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager")]
)
def test_compiled_models(compiled: Any) -> None:
    net = rows.create("vit")
    expected = vizattn.relevance(net, rows.images())
    model = compiled(net)
    model = net if model is None else model  # in place
    model(rows.images())  # compiled without hooks
    assert len(vizattn.attention_maps(model, rows.images())) == 4
    torch.testing.assert_close(vizattn.relevance(model, rows.images()), expected)


@pytest.mark.parametrize("family", ["efficientvit", "halonet", "biformer"])
def test_fused_models(family: str) -> None:
    model, images = families.create(family).double(), families.images((32, 32)).double()
    before = vizattn.attention_maps(model, images)
    for fused, plain in zip(vizattn.attention_maps(vizattn.fuse(model), images), before, strict=True):
        torch.testing.assert_close(fused.weights(), plain.weights())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("mobilevit_xxs", {}),
        ("crossvit_9_240", {}),
        ("pit_ti_224", {}),
        ("cait_xxs24_224", {"depth": 1}),
        ("vit_small_patch16_18x2_224", {"depth": 1}),  # two attentions side by side
    ],
)
def test_models_without_known_maps_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(VizattnError, match=r"No attention maps are known of \w+.*vizattn's backbones"):
        vizattn.attention_maps(timm.create_model(name, **options), torch.zeros(1, 3, 32, 32))
