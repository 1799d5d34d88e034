"""Bundles of segmenters: what is in them, and one clear message for each way they can be wrong."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from rows import create, create_maps, create_segmenter, images, randomise
from safetensors.torch import load_file, save_file
from test_bundle import edit

import vizattn
from vizattn.adapters import adapter_state, attached, fingerprint, read_bundle
from vizattn.adapters.bundle import CONFIG_NAME, WEIGHTS_NAME
from vizattn.errors import VizattnError
from vizattn.heads import Segmenter


@pytest.fixture
def bundle(tmp_path):
    model = create_segmenter("vit", "vpt_deep")
    randomise(model)
    return vizattn.save_adapter(model, tmp_path / "bundle", class_names=list("abcdefg"))


def logits(model):
    with torch.no_grad():
        return model.eval()(images())


def unchanged(backbone):
    plain = create_maps("vit")
    with torch.no_grad():
        same = all(torch.equal(a, b) for a, b in zip(backbone(images()), plain(images()), strict=True))
    return same and not attached(backbone) and all(p.requires_grad for p in backbone.parameters())


def test_contents(bundle):
    config = read_bundle(bundle)
    assert config["backbone"]["out_indices"] == [1, 2, 3]
    assert config["segmenter"] == {"num_classes": 7, "head": "linear", "auxiliary": False}
    assert config["num_classes"] == 7 and config["class_names"] == list("abcdefg")
    assert config["backbone"]["features_only"] is True and "features_only" not in config["backbone"]["args"]
    model = create_segmenter("vit", "vpt_deep")
    prompts = {f"adapters.vpt.prompts.{i}" for i in range(4)}
    assert set(load_file(bundle / WEIGHTS_NAME)) == prompts | {f"heads.{name}" for name in model.head_state()}
    assert config["fingerprint"] == fingerprint(model) == fingerprint(model.backbone)
    state = model.state_dict()
    names = {f"backbone.model.{name}" for name in prompts} | set(model.head_state())
    assert set(adapter_state(model)) == names <= set(state)
    assert all(t.data_ptr() == state[n].data_ptr() for n, t in adapter_state(model).items())


HEADS = [
    ("vit", "hst", {"head": "upernet", "dim": 8, "pool_scales": (1, 2), "auxiliary": True}),
    ("vit_va", "apla", {"head": "semantic_fpn", "fpn_dim": 8, "dim": 8}),
    ("swin", "vpt_deep", {"head": "semantic_fpn", "fpn_dim": 8, "dim": 8, "auxiliary": True}),
    ("vit_va", "efficient_probing", {"head": "setr_pup", "dim": 8}),
]


@pytest.mark.parametrize(("row", "method", "options"), HEADS)
def test_heads_come_back_with_their_statistics(row, method, options, tmp_path):
    model = Segmenter(create_maps(row, method), 5, **options).train()
    randomise(model)
    assert (model.forward_auxiliary(images(4))[1] is None) != options.get("auxiliary", False)
    folder = vizattn.save_adapter(model, tmp_path / "bundle")
    again = vizattn.load_adapter(create_maps(row).train(), folder)
    assert again.training and again.head_config == model.head_config
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    again(images(4)).sum().backward()
    model(images(4)).sum().backward()
    for p, q in zip(again.decode_head.parameters(), model.decode_head.parameters(), strict=True):
        assert p.device == q.device and p.is_leaf and p.grad is not None
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["apla", "hst", "efficient_probing", "linear_probe", "full"])
def test_a_bundle_makes_the_segmenter(method, tmp_path):
    """With the backbone's weights from a file; the bundle of one that trained whole needs none."""
    args = {"out_indices": (-2, -1), "depth": 5, "embed_dim": 48, "patch_size": 8}
    if method == "hst":
        args["out_indices"] = (4,)
    weights = tmp_path / "backbone.safetensors"
    plain = timm.create_model("vit_va_nano_patch4_32", depth=5, embed_dim=48, patch_size=8)
    save_file(plain.state_dict(), weights)
    maps = timm.create_model(
        "vit_va_nano_patch4_32",
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights)},
        **args,
    )
    options = {"hst": {"widths": (8, 8), "num_heads": (2, 2)}, "efficient_probing": {"num_queries": 4}}
    model = Segmenter(vizattn.attach(maps, method, **options.get(method, {})), 3, head="linear")
    randomise(model)
    folder = vizattn.save_adapter(model, tmp_path / "bundle")
    again = vizattn.create_from_bundle(folder, None if method == "full" else weights)
    assert isinstance(again, Segmenter) and not again.training
    assert torch.equal(logits(again), logits(model))
    if method != "full":
        assert (folder / WEIGHTS_NAME).stat().st_size < weights.stat().st_size / 2


def test_maps_without_a_head_have_bundles_too(tmp_path):
    model = create_maps("vit", "full")
    randomise(model)
    folder = vizattn.save_adapter(model, tmp_path / "bundle")
    assert read_bundle(folder)["segmenter"] is None
    again = vizattn.create_from_bundle(folder)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(images()), model.eval()(images()), strict=True))


def test_bundles_from_before_there_were_segmenters(tmp_path):
    folder = vizattn.save_adapter(vizattn.attach(create("vit"), "apla"), tmp_path / "bundle")
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["segmenter"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    assert attached(vizattn.load_adapter(create("vit"), folder))


def test_names_of_classes_are_counted(tmp_path):
    with pytest.raises(VizattnError, match="2 class names for a head of 7 classes"):
        vizattn.save_adapter(create_segmenter("vit", "apla"), tmp_path / "bundle", class_names=["a", "b"])
    with pytest.raises(VizattnError, match="no adapter is attached"):
        vizattn.save_adapter(Segmenter(create_maps("vit"), 7), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


WRONG_HEADS = [
    ({"head": "upernett"}, r"Unknown segmentation head 'upernett'.*upernet"),
    ({"head": 3}, "damaged: look at segmenter"),
    ({"num_classes": 8}, "damaged: look at segmenter"),
    ({"auxiliary": "no"}, "damaged: look at segmenter"),
    ({"dim": 8}, "linear' has no options, got 'dim'"),
    ({"head": "upernet", "dims": 8}, r"'dims'.*dim"),
    ({"head": "upernet", "dim": "8"}, "damaged: no head can be made"),
    ({"head": "upernet", "dim": 10**15}, r"damaged: no head can be made|does not fit this model"),
    ({"head": "upernet", "dim": 10**7}, r"does not fit this model"),
    ({"backbone": "resnet18"}, "damaged: no head can be made"),
    ({"auxiliary": True}, r"heads\.auxiliary_head\.\S+ is missing"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_HEADS)
def test_wrong_heads_in_the_config(bundle, change, message):
    edit(bundle, segmenter={**read_bundle(bundle)["segmenter"], **change})
    backbone = create_maps("vit")
    with pytest.raises(VizattnError, match=message):
        vizattn.load_adapter(backbone, bundle)
    assert unchanged(backbone)


@pytest.mark.parametrize("value", [3, [], "linear", {}])
def test_wrong_types_in_the_config(bundle, value):
    edit(bundle, segmenter=value)
    with pytest.raises(VizattnError, match="damaged: look at segmenter"):
        read_bundle(bundle)


def test_a_segmenter_on_a_classifier_is_damaged(bundle):
    edit(bundle, backbone={**read_bundle(bundle)["backbone"], "features_only": False})
    with pytest.raises(VizattnError, match="damaged: look at segmenter"):
        read_bundle(bundle)


@pytest.mark.parametrize("keep", [0, 40, 1000])
def test_truncated_weights(bundle, keep):
    (bundle / WEIGHTS_NAME).write_bytes((bundle / WEIGHTS_NAME).read_bytes()[:keep])
    backbone = create_maps("vit")
    with pytest.raises(VizattnError, match="damaged or truncated"):
        vizattn.load_adapter(backbone, bundle)
    assert unchanged(backbone)


def test_future_format(bundle):
    edit(bundle, format_version=2)
    with pytest.raises(VizattnError, match="format 2"):
        vizattn.load_adapter(create_maps("vit"), bundle)


def test_wrong_backbones(bundle, tmp_path):
    for backbone, message in (
        (create_maps("swin"), r"was trained on vit_tiny_patch16_224\S*, not on swin"),
        (create("vit"), r"was trained on a features_only model, this is a classifier.*with features_only=True"),
        (
            create_maps("vit", out_indices=(0, 2, 3)),
            r"trained on the maps \[1, 2, 3\].*create it with out_indices=\[1, 2, 3\]",
        ),
        (create_maps("vit", embed_dim=96), "does not fit this model"),
        (create_maps("vit").bfloat16(), "saved from a float32 model, this one is bfloat16"),
    ):
        with pytest.raises(VizattnError, match=message):
            vizattn.load_adapter(backbone, bundle)
        assert not attached(backbone)
    backbone = create_maps("vit")
    with torch.no_grad():
        backbone.model.blocks[1].mlp.fc1.bias[0] += 1e-6
    with pytest.raises(VizattnError, match="fingerprint of the frozen weights differs"):
        vizattn.load_adapter(backbone, bundle)
    classifier = vizattn.save_adapter(vizattn.attach(create("vit"), "apla"), tmp_path / "classifier")
    with pytest.raises(VizattnError, match="was trained on a classifier, this is a features_only model"):
        vizattn.load_adapter(create_maps("vit"), classifier)


def test_loading_needs_the_backbone_alone(bundle):
    with pytest.raises(VizattnError, match="Load onto the features_only backbone"):
        vizattn.load_adapter(Segmenter(create_maps("vit"), 7, head="linear"), bundle)
    with pytest.raises(VizattnError, match="detach"):
        vizattn.load_adapter(create_maps("vit", "apla"), bundle)


def test_the_backbone_of_a_loaded_segmenter_detaches(bundle):
    backbone = create_maps("vit")
    segmenter = vizattn.load_adapter(backbone, bundle)
    assert segmenter.backbone is backbone and segmenter.training == backbone.training
    vizattn.detach(backbone)
    assert unchanged(backbone)
