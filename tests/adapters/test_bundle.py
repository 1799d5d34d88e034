"""Bundles: what is in them, and one clear message for each way they can be wrong."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from rows import create, images, randomise
from safetensors.torch import load_file

import vizattn
from vizattn.adapters import adapter_state, attached, fingerprint, read_bundle
from vizattn.adapters.bundle import CONFIG_NAME, WEIGHTS_NAME
from vizattn.engine import load_trained
from vizattn.errors import VizattnError


@pytest.fixture
def bundle(tmp_path):
    model = vizattn.attach(create("vit"), "vpt", num_tokens=2)
    randomise(model)
    return vizattn.save_adapter(model, tmp_path / "bundle", class_names=list("abcde"))


def edit(bundle, **changes):
    config = json.loads((bundle / CONFIG_NAME).read_text())
    (bundle / CONFIG_NAME).write_text(json.dumps({**config, **changes}))


def unchanged(model):
    reference = create("vit")
    with torch.no_grad():
        same = torch.equal(model(images()), reference(images()))
    return same and not attached(model) and type(model) is type(reference)


def test_contents(bundle):
    assert sorted(p.name for p in bundle.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    config = read_bundle(bundle)
    assert config["backbone"]["name"] == "vit_tiny_patch16_224"
    assert config["backbone"]["args"] == {
        "img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3
    } | config["backbone"]["args"]  # fmt: skip
    assert config["adapters"] == [
        {"method": "vpt", "options": {"num_tokens": 2, "deep": True, "dropout": 0.0, "project": None}}
    ]
    assert config["num_classes"] == 5 and config["class_names"] == list("abcde")
    assert config["preprocessing"]["input_size"] == [3, 32, 32]
    assert {"mean", "std", "interpolation", "crop_pct"} <= set(config["preprocessing"])
    assert config["fingerprint"] == fingerprint(vizattn.attach(create("vit"), "vpt", num_tokens=2))
    names = set(load_file(bundle / WEIGHTS_NAME))
    assert names == {"head.weight", "head.bias", *(f"adapters.vpt.prompts.{i}" for i in range(4))}


def test_buffers_that_changed_are_saved(tmp_path):
    model = vizattn.attach(create("vit"), "efficient_probing", num_queries=4).train()
    model(images(8))
    name = "adapters.efficient_probing.norm.running_mean"
    assert adapter_state(model)[name].abs().sum() > 0
    vizattn.save_adapter(model, tmp_path / "bundle")
    loaded = vizattn.load_adapter(create("vit"), tmp_path / "bundle")
    assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))


def test_apla_reload_does_not_depend_on_the_seed(tmp_path):
    model = vizattn.attach(create("vit"), "apla", num_rows=5, seed=3)
    randomise(model)
    folder = vizattn.save_adapter(model, tmp_path / "bundle")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["adapters"][0]["options"]["seed"] = 4  # as if random numbers were drawn differently
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    loaded = vizattn.load_adapter(create("vit"), folder)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_two_adapters_in_one_bundle(tmp_path):
    model = vizattn.attach(create("vit"), "vpt", num_tokens=2)
    vizattn.attach(model, "efficient_probing", num_queries=4)
    randomise(model)
    vizattn.save_adapter(model, tmp_path / "bundle")
    loaded = vizattn.load_adapter(create("vit"), tmp_path / "bundle")
    assert [a.method for a in attached(loaded)] == ["vpt", "efficient_probing"]
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_detach_after_load_gives_the_old_head_back(bundle):
    model = create("vit", num_classes=3)
    vizattn.load_adapter(model, bundle)
    assert model(images()).shape == (2, 5) and model.num_classes == 5
    vizattn.detach(model)
    assert model.num_classes == 3
    with torch.no_grad():
        assert torch.equal(model(images()), create("vit", num_classes=3)(images()))


def test_saving_twice_replaces_the_bundle(bundle):
    model = vizattn.attach(create("vit"), "linear_probe")
    vizattn.save_adapter(model, bundle)
    assert read_bundle(bundle)["adapters"][0]["method"] == "linear_probe"
    assert sorted(p.name for p in bundle.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


def test_wrong_architecture(bundle):
    model = create("eva02")
    with pytest.raises(VizattnError, match=r"was trained on vit_tiny_patch16_224.*not on eva02_tiny"):
        vizattn.load_adapter(model, bundle)
    assert not attached(model)


def test_wrong_weights(bundle):
    model = create("vit")
    with torch.no_grad():
        model.blocks[2].mlp.fc1.bias[0] += 1e-6
    before = model(images())
    with pytest.raises(VizattnError, match="fingerprint of the frozen weights differs"):
        vizattn.load_adapter(model, bundle)
    assert not attached(model) and torch.equal(model(images()), before)


def test_other_size_of_the_same_name(bundle):
    model = create("vit", depth=2)
    with pytest.raises(VizattnError, match=r"unexpected|missing|fingerprint"):
        vizattn.load_adapter(model, bundle)
    assert not attached(model)


@pytest.mark.parametrize("keep", [0, 40, 1000])
def test_truncated_weights(bundle, keep):
    data = (bundle / WEIGHTS_NAME).read_bytes()
    (bundle / WEIGHTS_NAME).write_bytes(data[:keep])
    model = create("vit")
    with pytest.raises(VizattnError, match="damaged or truncated"):
        vizattn.load_adapter(model, bundle)
    assert unchanged(model)


def test_one_flipped_bit(bundle):
    data = bytearray((bundle / WEIGHTS_NAME).read_bytes())
    data[-5] ^= 1
    (bundle / WEIGHTS_NAME).write_bytes(bytes(data))
    with pytest.raises(VizattnError, match="damaged or truncated"):
        vizattn.load_adapter(create("vit"), bundle)


def test_future_format(bundle):
    edit(bundle, format_version=2, vizattn_version="9.0")
    with pytest.raises(VizattnError, match=r"format 2.*reads format 1.*upgrade vizattn.*9\.0"):
        vizattn.load_adapter(create("vit"), bundle)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_file(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(VizattnError, match=f"{name} is missing"):
        vizattn.load_adapter(create("vit"), bundle)


def test_no_folder(tmp_path):
    with pytest.raises(VizattnError, match="no such folder"):
        read_bundle(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format_version": 1}', '{"format_version": 1, "adapters": 3}'])
def test_damaged_config(bundle, text):
    (bundle / CONFIG_NAME).write_text(text)
    model = create("vit")
    with pytest.raises(VizattnError, match="damaged"):
        vizattn.load_adapter(model, bundle)
    assert unchanged(model)


def test_unknown_method_and_option(bundle):
    edit(bundle, adapters=[{"method": "vpf", "options": {}}])
    with pytest.raises(VizattnError, match="Unknown adapter 'vpf'"):
        vizattn.load_adapter(create("vit"), bundle)
    edit(bundle, adapters=[{"method": "vpt", "options": {"tokens": 3}}])
    model = create("vit")
    with pytest.raises(VizattnError, match="num_tokens"):
        vizattn.load_adapter(model, bundle)
    assert unchanged(model)


def test_load_onto_an_adapted_model(bundle):
    model = vizattn.attach(create("vit"), "linear_probe")
    with pytest.raises(VizattnError, match="detach"):
        vizattn.load_adapter(model, bundle)
    assert [a.method for a in attached(model)] == ["linear_probe"]


def test_save_without_adapter_or_with_wrong_names(tmp_path):
    with pytest.raises(VizattnError, match="no adapter is attached"):
        vizattn.save_adapter(create("vit"), tmp_path / "bundle")
    with pytest.raises(VizattnError, match="2 class names for a head of 5"):
        vizattn.save_adapter(vizattn.attach(create("vit"), "linear_probe"), tmp_path / "bundle", class_names=["a", "b"])
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk_leaves_the_old_bundle(bundle, monkeypatch):
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        vizattn.save_adapter(vizattn.attach(create("vit"), "linear_probe"), bundle)
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before


def test_an_interrupted_second_save_leaves_a_whole_bundle(bundle, monkeypatch):
    """Killed before each of the three renames: the old bundle or the new one, never a mixture."""
    replace = os.replace
    for after in range(3):
        old = vizattn.load_adapter(create("vit"), bundle)
        new = vizattn.attach(create("vit"), "vpt", num_tokens=2)
        randomise(new, seed=20 + after)
        done = []

        def stop(*args, done=done, after=after):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(replace(*args))

        monkeypatch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            vizattn.save_adapter(new, bundle, class_names=list("abcde"))
        monkeypatch.setattr("os.replace", replace)
        found = vizattn.load_adapter(create("vit"), bundle)
        with torch.no_grad():
            assert torch.equal(found(images()), (new if after == 2 else old)(images()))


def test_pooling_is_part_of_the_bundle(tmp_path):
    model = vizattn.attach(create("vit"), "vpt", num_tokens=2)
    model.reset_classifier(5, "avg")
    folder = vizattn.save_adapter(model, tmp_path / "bundle")
    with pytest.raises(VizattnError, match="global_pool='avg'"):
        vizattn.load_adapter(create("vit"), folder)
    loaded = vizattn.load_adapter(create("vit", **read_bundle(folder)["backbone"]["args"]), folder)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_other_type_of_numbers(bundle):
    with pytest.raises(VizattnError, match="saved from a float32 model, this one is bfloat16"):
        vizattn.load_adapter(create("vit").bfloat16(), bundle)


def test_a_bundle_in_half_precision_makes_its_model_again(tmp_path):
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=5, dtype=torch.bfloat16)
    vizattn.attach(model, "vpt", num_tokens=2)
    folder = vizattn.save_adapter(model, tmp_path / "half", class_names=list("abcde"))
    again = vizattn.create_from_bundle(folder)
    with torch.no_grad():
        assert torch.equal(again(images().bfloat16()), model.eval()(images().bfloat16()))
        # The command line computes with the same weights in single precision.
        assert torch.equal(load_trained(folder).model(images()), again.float()(images()))


WRONG_TYPES = [
    {"backbone": {"name": "a", "args": {}, "dtype": "load"}},
    {"class_names": ["a"]},
    {"class_names": [1, 2, 3, 4, 5]},
    {"backbone": 3},
    {"backbone": {"name": 3, "args": {}}},
    {"backbone": {"name": "a", "args": {}, "tag": 3}},
    {"backbone": {"name": "a", "args": {}, "out_indices": 3}},
    {"adapters": []},
    {"adapters": ["vpt"]},
    {"adapters": [{"method": "vpt", "options": 3}]},
    {"num_classes": "5"},
    {"preprocessing": None},
    {"metadata": []},
    {"format_version": "1"},
]


@pytest.mark.parametrize("changes", WRONG_TYPES)
def test_wrong_types_in_the_config(bundle, changes):
    edit(bundle, **changes)
    with pytest.raises(VizattnError, match="damaged"):
        read_bundle(bundle)


@pytest.mark.parametrize("left_out", [2.5, "depth", [3]])
def test_wrong_names_of_arguments_in_the_config(bundle, left_out):
    backbone = json.loads((bundle / CONFIG_NAME).read_text())["backbone"]
    edit(bundle, backbone={**backbone, "args_left_out": left_out})
    with pytest.raises(VizattnError, match="damaged"):
        vizattn.create_from_bundle(bundle)


def test_an_option_that_no_memory_is_enough_for(bundle):
    adapters = json.loads((bundle / CONFIG_NAME).read_text())["adapters"]
    adapters[0] = {"method": "vpt", "options": {"num_tokens": 1 << 50}}
    edit(bundle, adapters=adapters)
    with pytest.raises(VizattnError, match="damaged: no vpt can be made with"):
        vizattn.load_adapter(create("vit"), bundle)


WHERE = {
    "checkpoint_path": "other.pth",
    "pretrained_cfg": {"url": "https://example.org/other.pth"},
    "pretrained_cfg_overlay": {"url": "https://example.org/other.pth"},
    "cache_dir": "elsewhere",
}


@pytest.mark.parametrize("key", WHERE)
def test_a_bundle_may_not_say_where_weights_are(bundle, key, monkeypatch):
    backbone = read_bundle(bundle)["backbone"]
    edit(bundle, backbone={**backbone, "args": {**backbone["args"], key: WHERE[key]}})
    model = create("vit")
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("it was used"))
    for load in (read_bundle, vizattn.adapters.create_from_bundle, lambda b: vizattn.load_adapter(model, b)):
        with pytest.raises(VizattnError, match=f"has '{key}' among the arguments of its backbone"):
            load(bundle)
    monkeypatch.undo()
    assert unchanged(model)


def test_where_weights_were_is_not_saved(tmp_path):
    model = create("vit")
    model._model_args |= WHERE
    backbone = read_bundle(vizattn.save_adapter(vizattn.attach(model, "apla"), tmp_path / "bundle"))["backbone"]
    assert not {*WHERE} & {*backbone["args"], *backbone["args_left_out"]} and backbone["args"]["depth"] == 4


def test_backbone_that_cannot_be_created(bundle):
    config = read_bundle(bundle)
    edit(bundle, backbone={**config["backbone"], "args": {"zz": 1}})
    with pytest.raises(VizattnError, match="cannot be created here"):
        vizattn.create_from_bundle(bundle)
    edit(bundle, backbone={**config["backbone"], "name": "vit_tinny_patch16_224"})
    with pytest.raises(VizattnError, match=r"unknown to timm.*vit_tiny_patch16_224"):
        vizattn.create_from_bundle(bundle)


def test_nothing_is_said_of_the_head_that_the_bundle_brings(tmp_path, caplog):
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=5)
    folder = vizattn.save_adapter(vizattn.attach(model, "linear_probe"), tmp_path / "bundle")
    caplog.clear()
    with caplog.at_level("INFO", "vizattn"):
        vizattn.create_from_bundle(folder)
    assert "newly initialised" not in caplog.text
