"""Bundles shown, compared, averaged and merged; several of them on one backbone."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from rows import METHODS, create, create_maps, create_segmenter, images, randomise
from safetensors.torch import load_file

import vizattn
from vizattn.adapters import BundleSet, attached, average_bundles, bundle_summary, compare_bundles, read_bundle
from vizattn.adapters.bundle import CONFIG_NAME, WEIGHTS_NAME
from vizattn.cli import main
from vizattn.data import preprocessing_of
from vizattn.engine import load_trained
from vizattn.errors import VizattnError


def saved(folder, method, seed=3, row="vit", num_classes=5, **options):
    """A bundle on the model of `row`; what it learnt follows from `seed`."""
    torch.manual_seed(0)
    name, usual = METHODS[method]
    model = vizattn.attach(create(row, num_classes=num_classes), name, **{**usual, **options})
    randomise(model, seed)
    return vizattn.save_adapter(model, folder, class_names=[f"class {i}" for i in range(num_classes)])


def packaged(folder, method, seed=3, num_classes=3, **options):
    """A bundle on the backbone whose weights are in the package."""
    torch.manual_seed(0)
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=num_classes)
    vizattn.attach(model, method, **options)
    randomise(model, seed)
    names = [f"class {i}" for i in range(num_classes)]
    return vizattn.save_adapter(model, folder, class_names=names, preprocessing=preprocessing_of(model))


def run(model):
    with torch.no_grad():
        return model.eval()(images())


# --- several bundles on one backbone ----------------------------------------------------------------------------------

MANY = {
    "prompts": ("vpt_deep", 5),
    "rows": ("apla", 5),
    "linear": ("linear_probe", 5),
    "linear too": ("linear_probe", 7),
    "probing": ("efficient_probing", 5),
    "probing too": ("efficient_probing", 2),
    "side": ("hst", 4),
}
SHARING = ["linear", "linear too", "probing", "probing too"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    return {
        name: saved(root / name, method, seed, num_classes=classes)
        for seed, (name, (method, classes)) in enumerate(MANY.items())
    }


@pytest.fixture(scope="module")
def alone(folders):
    """The logits of each bundle on a backbone of its own."""
    return {name: run(vizattn.load_adapter(create("vit"), folder)) for name, folder in folders.items()}


@pytest.fixture
def bundles(folders):
    found = BundleSet(create("vit"))
    for name, folder in folders.items():
        found.add(name, folder)
    return found


def test_switching_gives_each_bundle_again_and_again(bundles, alone):
    backbone = bundles.backbone
    kept = {name: p.data_ptr() for name, p in backbone.blocks[0].mlp.named_parameters()}
    for name in [*MANY, "rows", "rows", *reversed(MANY)]:
        model = bundles.use(name)
        assert model is backbone and bundles.active == name and not model.training
        assert torch.equal(run(model), alone[name]), name
        assert [a.method for a in attached(model)] == [METHODS[MANY[name][0]][0]]
    assert {name: p.data_ptr() for name, p in backbone.blocks[0].mlp.named_parameters()} == kept
    assert vizattn.trainable_summary(bundles.use("linear")).without_head == 0


def test_one_pass_serves_all_that_read_the_same_features(bundles, alone):
    passes = []
    bundles.backbone.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    found = bundles.logits(images(), SHARING)
    assert list(found) == SHARING and len(passes) == 2  # with the last norm, and without it
    assert all(torch.equal(found[name], alone[name]) for name in SHARING)
    passes.clear()
    assert list(bundles.logits(images(), ["probing", "probing too"])) == ["probing", "probing too"]
    assert len(passes) == 1
    with pytest.raises(VizattnError, match=r"'prompts' \(vpt\) cannot share.*efficient_probing, linear_probe"):
        bundles.logits(images())
    assert len(passes) == 1
    with pytest.raises(VizattnError, match=r"Unknown bundle 'lineer'\. Did you mean 'linear'"):
        bundles.logits(images(), ["lineer"])


def test_what_does_not_belong_is_refused_and_changes_nothing(bundles, alone, tmp_path):
    for row, method, name, message in (
        ("vit", "full", "new", "is of 'full': it is a whole model and shares no backbone"),
        ("vit_va", "linear_probe", "new", "was trained on vit_va_nano_patch4_32"),
        ("vit", "linear_probe", "rows", "There is a bundle 'rows' already"),
    ):
        folder = saved(tmp_path / f"{row}-{method}", method, row=row)
        bundles.use("side")
        with pytest.raises(VizattnError, match=message):
            bundles.add(name, folder)
        assert bundles.names == list(MANY) and torch.equal(run(bundles.use("side")), alone["side"])
    with pytest.raises(VizattnError, match="at least one"):
        BundleSet.load({})


def test_segmenters_switch_too(tmp_path):
    folders, expected = {}, {}
    for seed, method in enumerate(("apla", "efficient_probing")):
        model = create_segmenter("vit", method)
        randomise(model, seed)
        folders[method], expected[method] = vizattn.save_adapter(model, tmp_path / method), run(model)
    bundles = BundleSet(create_maps("vit"))
    for name, folder in folders.items():
        bundles.add(name, folder)
    for name in (*folders, *folders):
        assert isinstance(bundles.use(name), vizattn.Segmenter)
        assert torch.equal(run(bundles.use(name)), expected[name])
    with pytest.raises(VizattnError, match="cannot share a pass"):
        bundles.logits(images(), ["efficient_probing"])


def test_bundles_make_their_backbone(tmp_path):
    folders = {name: packaged(tmp_path / name, "linear_probe", seed) for seed, name in enumerate("ab")}
    found = BundleSet.load(folders).logits(images())
    for name, folder in folders.items():
        assert torch.equal(found[name], run(vizattn.create_from_bundle(folder)))


# --- show and diff ----------------------------------------------------------------------------------------------------


def test_show(tmp_path, capsys):
    folder = packaged(tmp_path / "run" / "bundle", "apla", num_rows=2)
    found = bundle_summary(folder)
    assert found["adapters"] == [{"method": "apla", "options": {"num_rows": 2, "seed": 0}, "merges": True}]
    rows = 6 * 2 * 97
    assert found["parameters"] == {"adapters": 0, "heads": 3 * 97, "the backbone": rows}
    assert found["task"] == "classification" and all(holds for _, holds, _ in found["checks"])
    assert main(["bundle", "show", str(tmp_path / "run"), "--load"]) == 0
    out = capsys.readouterr().out
    assert "apla(num_rows=2, seed=0), merges" in out and "class 0, class 1, class 2" in out
    assert "loads onto its backbone" in out and "NO" not in out
    assert main(["bundle", "show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_classes"] == 3

    (folder / WEIGHTS_NAME).write_bytes(b"no")
    assert main(["bundle", "show", str(folder), "--load"]) == 1
    assert capsys.readouterr().out.count("NO: ") == 2
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"backbone": config["backbone"] | {"name": "vit_nono"}}))
    assert {what: holds for what, holds, _ in bundle_summary(folder)["checks"]}["backbone is known"] is False


def test_show_finds_numbers_that_are_none(tmp_path):
    model = vizattn.attach(create("vit"), "linear_probe")
    torch.nn.init.constant_(model.head.bias, float("nan"))
    checks = bundle_summary(vizattn.save_adapter(model, tmp_path))["checks"]
    assert ("numbers are finite", False, "not in head.bias") in checks


def test_diff(tmp_path, capsys):
    a, b = saved(tmp_path / "a", "vpt_deep"), saved(tmp_path / "b", "vpt_deep", num_tokens=4)
    found = compare_bundles(a, b)
    assert {"option": "adapters.0.options.num_tokens", "first": 3, "second": 4} in found["config"]
    assert {"tensor": "adapters.vpt.prompts.0", "shapes": [[3, 48], [4, 48]]} in found["tensors"]
    assert main(["bundle", "diff", str(a), str(b)]) == 1
    assert "(3, 48) and (4, 48)" in capsys.readouterr().out
    assert main(["bundle", "diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == "They are the same.\n"

    c = saved(tmp_path / "c", "vpt_deep", seed=9)
    found = compare_bundles(a, c)
    one, other = load_file(a / WEIGHTS_NAME), load_file(c / WEIGHTS_NAME)
    assert found["config"] == [] and [row["tensor"] for row in found["tensors"]] == sorted(one)
    for row in found["tensors"]:
        change = other[row["tensor"]].double() - one[row["tensor"]].double()
        assert row["largest"] == pytest.approx(change.abs().max().item())
        assert row["relative"] == pytest.approx((change.norm() / one[row["tensor"]].double().norm()).item())
    missing = compare_bundles(a, saved(tmp_path / "d", "linear_probe"))["tensors"]
    assert {"tensor": "adapters.vpt.prompts.0", "shapes": [[3, 48], None]} in missing


# --- average ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vpt_deep", "apla", "efficient_probing", "full"])
def test_the_average_is_the_weighted_mean(method, tmp_path):
    folders = [saved(tmp_path / str(seed) / "bundle", method, seed) for seed in range(3)]
    shares = [1.0, 2.0, 5.0]
    target = average_bundles(folders, tmp_path / "average", shares)
    states = [load_file(folder / WEIGHTS_NAME) for folder in folders]
    found = load_file(target / WEIGHTS_NAME)
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        mean = sum(share / 8 * state[name].double() for share, state in zip(shares, states))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == states[0][name].dtype
    config = read_bundle(target)
    assert [origin["share"] for origin in config["metadata"]["average_of"]] == [1 / 8, 2 / 8, 5 / 8]
    assert [origin["bundle"] for origin in config["metadata"]["average_of"]] == ["0/bundle", "1/bundle", "2/bundle"]
    assert "accuracy" not in config["metadata"]
    run(vizattn.load_adapter(create("vit"), target))


def test_the_average_of_one_head_is_the_average_of_its_logits(tmp_path, capsys):
    folders = [packaged(tmp_path / str(seed), "linear_probe", seed) for seed in range(2)]
    assert main(["bundle", "average", *map(str, folders), "--out", str(tmp_path / "both")]) == 0
    first, second, both = (run(vizattn.create_from_bundle(f)) for f in (*folders, tmp_path / "both"))
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-5)
    assert main(["bundle", "average", *map(str, folders), "--out", str(tmp_path / "both")]) == 2
    assert "There is a bundle in" in capsys.readouterr().err


def test_what_is_not_averaged(tmp_path):
    a = saved(tmp_path / "a", "apla")
    others = [
        (saved(tmp_path / "b", "apla", num_rows=6), "num_rows is 5 in"),
        (saved(tmp_path / "c", "linear_probe"), r"adapters\.0\.method is 'apla' in .* and 'linear_probe' in"),
        (saved(tmp_path / "d", "apla", num_classes=4), "num_classes is 5 in"),
        (saved(tmp_path / "e", "apla", row="vit_va"), "backbone.name is"),
    ]
    for other, message in others:
        with pytest.raises(VizattnError, match=message):
            average_bundles([a, other], tmp_path / "out")
    for folders, shares, message in (
        ([a], None, "at least two"),
        ([a, a], [1.0], "2 bundles need as many shares above 0, not 1.0"),
        ([a, a], [1.0, -1.0], "shares above 0"),
        ([a, a], [1.0, float("nan")], "shares above 0"),
    ):
        with pytest.raises(VizattnError, match=message):
            average_bundles(folders, tmp_path / "out", shares)
    assert not (tmp_path / "out").exists()


def test_places_that_differ_are_not_averaged(tmp_path):
    """Rows of other channels, should the same options ever choose them."""
    a, b = saved(tmp_path / "a", "apla"), tmp_path / "b"
    model = vizattn.attach(create("vit"), "apla", num_rows=5)
    model.blocks[0].attn.proj.indices.copy_(torch.arange(5))
    vizattn.save_adapter(model, b, class_names=read_bundle(a)["class_names"])
    with pytest.raises(VizattnError, match=r"blocks\.0\.attn\.proj\.indices differs"):
        average_bundles([a, b], tmp_path / "out")


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("apla", {"num_rows": 4}), ("full", {}), ("linear_probe", {})])
def test_merged_bundles_are_plain_models_of_timm(method, options, tmp_path, capsys):
    folder, target = packaged(tmp_path / "bundle", method, **options), tmp_path / "merged"
    expected = run(vizattn.create_from_bundle(folder))
    assert main(["bundle", "merge", str(folder), "--out", str(target)]) == 0
    assert "differ from the bundle's by 0.0e+00" in capsys.readouterr().out
    trained = load_trained(target)
    assert trained.class_names == ["class 0", "class 1", "class 2"] and not attached(trained.model)
    assert torch.equal(run(trained.model), expected)
    assert torch.equal(run(timm.create_model(f"local-dir:{target}", pretrained=True)), expected)
    plain = timm.create_model("vit_va_nano_patch4_32", num_classes=3, checkpoint_path=str(target / "model.safetensors"))
    assert torch.equal(run(plain), expected)
    assert main(["bundle", "merge", str(folder), "--out", str(target)]) == 2
    assert "There is a model in" in capsys.readouterr().err


def test_merged_segmenters(tmp_path):
    backbone = timm.create_model("vit_va_nano_patch4_32", pretrained=True, features_only=True, out_indices=(1, 2))
    model = vizattn.Segmenter(vizattn.attach(backbone, "apla", num_rows=4), 3, head="linear")
    randomise(model)
    vizattn.save_adapter(model, tmp_path / "bundle", class_names=list("abc"), preprocessing=preprocessing_of(backbone))
    assert main(["bundle", "merge", str(tmp_path / "bundle"), "--out", str(tmp_path / "merged")]) == 0
    assert torch.equal(run(load_trained(tmp_path / "merged").model), run(model))


@pytest.mark.parametrize("method", ["vpt_deep", "efficient_probing", "hst", "side_tuning"])
def test_what_does_not_merge_says_why(method, tmp_path, capsys):
    folder = saved(tmp_path / "bundle", method)
    assert main(["bundle", "merge", str(folder), "--out", str(tmp_path / "merged")]) == 2
    message = capsys.readouterr().err
    assert f"its adapter {METHODS[method][0]!r} cannot be: " in message and "Traceback" not in message
    assert not (tmp_path / "merged").exists()


MISTAKES = [
    (["shwo", "x"], "Did you mean 'show'"),
    (["diff", "x"], "Usage: vizattn bundle diff DIR DIR"),
    (["average", "x", "y"], "Usage: vizattn bundle average DIR DIR ... --out DIR"),
    (["show", "x"], "x is not a bundle"),
    (["diff", "x", "y", "--shares", "1"], "--shares does not go with: vizattn bundle diff"),
    (["show", "x", "--weights", "y"], "--weights goes with: vizattn bundle show --load"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_of_the_command(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bundle", *arguments]) == 2
    assert message in capsys.readouterr().err
