"""What holds for every method on the maps of every family of models, alone and under a segmentation head."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from rows import DENSE, METHODS, create, create_maps, create_segmenter, images, randomise
from timm.models._features import FeatureGetterNet

import vizattn
from vizattn.adapters import attached, cache_level, query_maps
from vizattn.adapters.anatomy import core
from vizattn.adapters.hst import _resize
from vizattn.errors import VizattnError
from vizattn.heads import Segmenter

each = pytest.mark.parametrize(("method", "row"), DENSE)
OTHER_MAPS = ("hst", "efficient_probing")


def maps_of(model, x=None):
    with torch.no_grad():
        maps = model(images() if x is None else x)
    return list(maps.values()) if isinstance(maps, dict) else maps


def same(maps, others):
    return all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))


def test_every_method_works_on_maps():
    assert {method for method, _ in DENSE} == set(METHODS)


@each
def test_one_training_step(method, row):
    """Frozen weights keep every bit, every trainable parameter gets a finite gradient, and what is added learns."""
    model = create_segmenter(row, method).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b.clone() for n, b in core(model).named_buffers() if not n.startswith("adapters.")}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    before = [p.detach().clone() for _, p in trained]
    optimizer = torch.optim.SGD([p for _, p in trained], lr=0.1)
    logits = model(images(4))
    assert logits.shape == (4, 7, 32 // model.stride, 32 // model.stride)
    logits.pow(2).mean().backward()
    optimizer.step()
    assert [n for n, p in trained if p.grad is None or not p.grad.isfinite().all()] == []
    moved = [not torch.equal(p, b) for (_, p), b in zip(trained, before)]
    assert sum(moved) >= 0.9 * len(moved)  # the key bias of HST's attention has no effect
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    assert bool(frozen) == (method != "full")
    if method != "full":
        assert all(torch.equal(core(model).get_buffer(n), b) for n, b in buffers.items())
    summary = vizattn.trainable_summary(model)
    heads = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("backbone."))
    assert summary.with_head - summary.without_head == heads > 0
    assert summary.with_head == sum(p.numel() for _, p in trained)
    assert (summary.without_head == 0) == (method == "linear_probe")


@each
def test_maps_are_what_feature_info_says(method, row):
    model = create_maps(row, method)
    randomise(model)
    plain = create_maps(row)
    maps = maps_of(model)
    channels = -1 if row == "swin" else 1
    assert [m.shape[channels] for m in maps] == model.feature_info.channels()
    assert [m.shape[1 if row == "swin" else 2] for m in maps] == [32 // r for r in model.feature_info.reduction()]
    if method not in OTHER_MAPS:
        assert model.feature_info is not plain.feature_info
        assert model.feature_info.get_dicts() == plain.feature_info.get_dicts()
        assert same(maps, maps_of(plain)) == (method == "linear_probe")
    assert cache_level(model) is None


@each
def test_disabled_and_detached_are_the_original(method, row):
    model, plain = create_maps(row, method), create_maps(row)
    randomise(model)
    expected, adapted = maps_of(plain), maps_of(model)
    info = model.feature_info
    with vizattn.disabled(model):
        assert same(maps_of(model), expected)
        assert model.feature_info.get_dicts() == plain.feature_info.get_dicts()
    assert same(maps_of(model), adapted) and model.feature_info is info
    vizattn.detach(model)
    assert same(maps_of(model), expected) and type(model) is type(plain)
    assert model.feature_info.get_dicts() == plain.feature_info.get_dicts()
    assert vars(model).keys() == vars(plain).keys()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    assert all(p.requires_grad for p in model.parameters())


@each
def test_a_segmenter_without_its_adapters(method, row):
    model = create_segmenter(row, method).eval()
    randomise(model)
    x = images()
    with torch.no_grad():
        adapted = model(x)
        if method in OTHER_MAPS:
            for take_off in (vizattn.detach, lambda m: vizattn.disabled(m).__enter__()):
                with pytest.raises(VizattnError, match=f"{METHODS[method][0]}.*pass segmenter.backbone"):
                    take_off(model)
            assert torch.equal(model(x), adapted)
            return
        plain = Segmenter(create_maps(row), 7, head="linear").eval()
        plain.load_state_dict(model.head_state(), strict=False)
        with vizattn.disabled(model):
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), adapted)
        if attached(model)[0].options.mergeable is True:
            vizattn.merge(model)
            assert torch.equal(model(x), adapted) and not attached(model)
        else:
            vizattn.detach(model)
            assert torch.equal(model(x), plain(x))


@each
def test_bf16_autocast(method, row):
    model = create_segmenter(row, method).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(4)).float().pow(2).mean()
    loss.backward()
    reference = model(images(4)).pow(2).mean()
    assert abs(loss - reference) <= 0.1 * reference + 1e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


COMPILED = [(m, b) for m, b in DENSE if b == "vit_va" or (b == "swin" and m in ("side_tuning", "efficient_probing"))]


@pytest.mark.parametrize(("method", "row"), COMPILED)
def test_compile_without_graph_breaks(method, row):
    model = create_segmenter(row, method).eval()
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


LOADER = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from rows import create_maps, images
import vizattn
result = {}
for row, folder in json.loads(sys.argv[2]):
    model = vizattn.load_adapter(create_maps(row), folder).eval()
    with torch.no_grad():
        result[folder] = model(images()).tolist()
print(json.dumps(result))
"""


def test_save_and_load_in_a_fresh_process(tmp_path):
    expected, jobs = {}, []
    for method, row in DENSE:
        model = create_segmenter(row, method).eval()
        randomise(model)
        folder = str(vizattn.save_adapter(model, tmp_path / f"{method}-{row}", class_names=list("abcdefg")))
        with torch.no_grad():
            expected[folder] = model(images()).tolist()
        jobs.append((row, folder))
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", LOADER, here, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected and len(expected) == len(DENSE)


# --- only what is read trains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["vit", "biformer", "swin"])
def test_blocks_after_the_last_map_get_no_prompts(row):
    model = create_maps(row, "vpt_deep", out_indices=(0,))
    prompts = core(model).adapters["vpt"].prompts
    depth = {"vit": 1, "biformer": 1, "swin": 2}[row]  # blocks up to the first map
    assert len(prompts) == depth < len(core(create_maps(row, "vpt_deep")).adapters["vpt"].prompts)
    Segmenter(model, 3, head="linear")(images()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in prompts)


def test_prompts_that_no_map_reads_are_refused():
    """As where the blocks after the last map are kept by hand."""
    model = FeatureGetterNet(create("vit", num_classes=0), out_indices=(1,), prune=False)
    with pytest.raises(VizattnError, match=r"no gradient reaches adapters\.vpt\.prompts\.2"):
        vizattn.attach(model, "vpt", num_tokens=2)
    assert not attached(model) and all(p.requires_grad for p in model.parameters())


def test_side_tuning_mixes_the_last_map_of_a_pyramid():
    for row, options in (("swin", {}), ("swin", {"feature_cls": "dict"}), ("nat", {"out_indices": (0, 1)})):
        model, plain = create_maps(row, "side_tuning", **options), create_maps(row, **options)
        *early, last = maps_of(model)
        *frozen, final = maps_of(plain)
        assert same(early, frozen) and not torch.equal(last, final)
        side = core(model).adapters["side_tuning"]
        grid = last.shape[1:3] if row == "swin" else last.shape[2:]
        with torch.no_grad():
            expected = 0.5 * final + 0.5 * (
                side.eval().side_map(images(), grid)
                if row == "swin"
                else side.side_map(images(), grid).permute(0, 3, 1, 2)
            )
        torch.testing.assert_close(last, expected)


def test_adapters_attach_before_the_head():
    segmenter = Segmenter(create_maps("vit"), 3, head="linear")
    with pytest.raises(VizattnError, match=r"before the Segmenter is built.*vizattn\.attach\(timm\.create_model"):
        vizattn.attach(segmenter, "apla")
    assert not attached(segmenter)


# --- the probe as a map -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["vit_va", "vit", "nat", "swin"])
def test_the_mean_of_the_probes_map_is_what_it_pools(row):
    model = create_maps(row, "efficient_probing")
    randomise(model)
    probe = core(model).adapters["efficient_probing"].probe
    raw = maps_of(create_maps(row))[-1]  # the last block's output, as it is
    z = model(images())[0]
    if row == "swin":
        raw, z = raw.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)
    tokens = raw.flatten(2).transpose(1, 2)
    torch.testing.assert_close(z.mean((2, 3)), probe(tokens), rtol=1e-4, atol=1e-6)
    n, queries = tokens.shape[1], len(probe.queries)
    scores = torch.einsum("qd,bnd->bqn", probe.queries, tokens) / tokens.shape[2] ** 0.5
    values = torch.einsum("bnd,ed->bne", tokens, probe.v.weight)
    expected = torch.cat(
        [n * a[..., None] * v for a, v in zip(scores.softmax(2).unbind(1), values.chunk(queries, 2))], 2
    )
    torch.testing.assert_close(z.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(query_maps(model, images()).flatten(2), scores.softmax(2))
    segmenter = Segmenter(model, 3, head="linear")
    assert torch.equal(query_maps(segmenter, images()), query_maps(model, images()))


def test_probe_of_some_maps_and_of_prompted_ones():
    model = create_maps("vit", out_indices=(1, 2))
    vizattn.attach(model, "vpt", num_tokens=2)
    vizattn.attach(model, "efficient_probing", num_queries=4, d_out=2)
    assert model.feature_info.channels() == [24] and model.feature_info.reduction() == [8]
    (z,) = model(images())
    assert z.shape == (2, 24, 4, 4)
    z.pow(2).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    vizattn.detach(model)
    assert same(maps_of(model), maps_of(create_maps("vit", out_indices=(1, 2))))


def test_the_class_token_has_no_place_in_a_map():
    with pytest.raises(VizattnError, match="no place in a map"):
        vizattn.attach(create_maps("vit"), "efficient_probing", num_queries=4, include_cls=True)


# --- the side pyramid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "patch"), [("vit_va", 4), ("vit_va", 8), ("vit_va", 16), ("vit", 8)])
@pytest.mark.parametrize("size", [(32, 64), (37, 50)])
def test_strides_of_the_side_pyramid(row, patch, size):
    """4, 8, 16 and 32 whatever the patch, and whatever the image."""
    free = {"dynamic_img_size": True, "dynamic_img_pad": True} if row == "vit" else {}
    model = create_maps(row, "hst", patch_size=patch, **free)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [8, 8, 16, 16]
    assert all(row["normed"] for row in model.feature_info.get_dicts())
    maps = maps_of(model, torch.randn(1, 3, *size))
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    with torch.no_grad():
        normed = [m.movedim(1, -1).var(-1, correction=0) for m in maps]
    assert all((v - 1).abs().max() < 0.01 for v in normed)


@pytest.mark.parametrize("patch", [4, 14, 16, 32])
@pytest.mark.parametrize("stride", [4, 16, 32])
def test_patches_lie_under_their_place_in_the_image(patch, stride):
    """A map that grows with its place keeps it, for images that are no multiple of anything."""
    side = 203
    grid, size = -(-side // patch), -(-side // stride)
    x = ((torch.arange(grid) + 0.5) * patch).expand(1, 1, grid, grid)
    y = _resize(x, (patch / stride, patch / stride), (size, size))
    centres = (torch.arange(size) + 0.5) * stride
    inner = (centres > patch) & (centres < side - patch - stride)
    assert y.shape == (1, 1, size, size) and inner.any()
    torch.testing.assert_close(y[0, 0, 0][inner], centres[inner])


def test_parameters_of_the_side_network_for_dense_prediction():
    """10.4 M on ViT-B/16; the paper says 13.2 M and does not say of what: its 0.78 M for classification is met."""
    model = timm.create_model("vit_base_patch16_224", features_only=True, device="meta")
    vizattn.attach(model, "hst", widths=(64, 128, 256, 384))
    assert vizattn.trainable_summary(model).without_head == 10_404_096
    assert model.feature_info.channels() == [64, 128, 256, 384]
