"""What a user can get wrong on the command line is one message and status 2, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope

from vizattn.cli import main
from vizattn.engine import evaluate, load_trained, train

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("recipe.json").write_text(json.dumps({**recipe, "schedule": {"epochs": 1}}))
    return ["train", "recipe.json", "--quiet"]


def message(capsys: Capture, *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and not DefaultScope._instance_dict.keys() - {"mmengine"}
    return err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "must be a JSON object of options, not a list"),
        ('"digits"', "must be a JSON object of options, not a str"),
        ('{"model": {"name": 3}}', "model.name must be str, not 3"),
    ],
)
def test_json_that_is_no_recipe(command: list[str], capsys: Capture, text: str, words: str) -> None:
    Path("recipe.json").write_text(text)
    assert words in message(capsys, *command)


def test_a_recipe_with_a_function(command: list[str], capsys: Capture) -> None:
    Path("recipe.py").write_text('model = dict(name="vit_va_nano_patch4_32", act_layer=lambda x: x)\n')
    assert "Option model.act_layer must be made of numbers" in message(capsys, "train", "recipe.py")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("data.val_fraction=abc", "data.val_fraction must be float, not 'abc'"),
        ("data.val_fraction=1.5", "val_fraction is a share of the images"),
        ("data.length=abc", "data.length must be int or None, not 'abc'"),
        ("data.length=-3", "data.length must be at least 1, not -3"),
        ("data.on_error=stopp", "data.on_error must be one of 'skip', 'stop'"),
        ("model.in_chans=1", "an RGB image fails with RuntimeError"),
        ("model.global_pool=''", "it gives an output of shape (1, 17, 3); logits of shape (1, 3) are needed"),
        ("optimizer.name=adahessian", "Unknown optimizer.name 'adahessian'"),
        ("optimizer.name=fusedadam", "Cannot build the optimizer 'fusedadam'"),
    ],
)
def test_options_that_cannot_work(command: list[str], capsys: Capture, option: str, words: str) -> None:
    assert words in message(capsys, *command, "--cfg-options", option)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["adapter.model=1"], "Unknown option of adapter 'vpt': 'model'"),
        (["adapter.keep_original=1"], "Unknown option of adapter 'vpt': 'keep_original'"),
        (["model.pretrained=False"], "its random weights would be lost. Use a name that timm lists"),
        (["model.checkpoint_path=x.pth"], "model.checkpoint_path='x.pth': these weights would not be found again"),
        (["model.name=local-dir:x"], "model.name='local-dir:x': it would not be found again"),
        (["adapter=none", "model.features_only=True"], "'list' object has no attribute 'shape'"),
    ],
)
def test_backbones_and_adapters_that_cannot_work(
    command: list[str], adapter_recipe: dict[str, Any], capsys: Capture, options: list[str], words: str
) -> None:
    Path("recipe.json").write_text(json.dumps({**adapter_recipe, "adapter": {"method": "vpt"}}))
    assert words in message(capsys, *command, "--cfg-options", *options)


@pytest.mark.parametrize("device", ["mps", "meta", "cuda", "cuda:63", "xpu"])
def test_devices_that_are_not_there(command: list[str], image_folder: Path, capsys: Capture, device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    assert device.split(":")[0] in message(capsys, *command, "--device", device)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system in which nothing can be made")
def test_a_work_dir_in_proc(command: list[str], capsys: Capture) -> None:
    assert "Cannot write /proc/x" in message(capsys, *command, "--work-dir", "/proc/x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": None}, "has 3 classes, but class_names None"),
        ({"class_names": ["left"]}, "has 3 classes, but class_names ['left']"),
        ({"preprocessing": None}, "preprocessing and config must be objects"),
        ({"preprocessing": {"interpolation": "cubic"}}, "preprocessing lacks input_size"),
        ({"config": []}, "preprocessing and config must be objects"),
        ({"model": None}, "Cannot load the model"),
        ({"format_version": "1"}, "Cannot load the model"),
        ({"format_version": 2}, "has format 2; this version of vizattn reads up to 1"),
    ],
)
def test_a_damaged_model_note(
    command: list[str], tmp_path_factory: pytest.TempPathFactory, capsys: Capture, change: dict[str, Any], words: str
) -> None:
    assert main([*command, "--work-dir", "run"]) == 0
    capsys.readouterr()
    path = Path("run/model/model.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert words in message(capsys, "eval", "run")


def test_published_weights_are_measured_with_their_own_head(command: list[str], capsys: Capture) -> None:
    options = ["--cfg-options", "data.length=520"]
    assert main(["eval", "classification/glyphs_pretrain", "--pretrained", "--json", "--split", "val", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 520
    assert found["accuracy"] > 0.9
    assert "published with a head of 52 classes, but data 'digits' has 10" in message(
        capsys, "eval", "classification/digits_vpt", "--pretrained"
    )
    assert "Name one thing to measure" in message(capsys, "eval", "--pretrained")
    assert "Unknown model 'nope'" in message(
        capsys, "eval", "classification/glyphs_pretrain", "--pretrained", "--cfg-options", "model.name=nope"
    )
    assert "/nowhere.\nExpected" in message(
        capsys, "eval", "classification/glyphs_pretrain", "--pretrained", "--data", "nowhere", "--split", "test"
    )


def test_an_unfinished_run_can_be_used(
    command: list[str], adapter_recipe: dict[str, Any], image_folder: Path, capsys: Capture
) -> None:
    recipe = {**adapter_recipe, "adapter": {"method": "vpt", "num_tokens": 2}, "ema": {"decay": 0.5}}
    whole = train({**recipe, "schedule": {"epochs": 1}}, work_dir="run", quiet=True)
    Path("run/bundle").rename("elsewhere")
    newest = Path("run/checkpoints/iter_00000005.pth")
    for place in ("run", newest, Path("run/checkpoints/best.pth")):
        found = evaluate(place)
        assert found == whole.metrics["test"]
    assert load_trained(newest).class_names == ["left", "middle", "right"]
    picture = str(image_folder / "test" / "left" / "0.png")
    assert main(["predict", picture, "--bundle", str(newest), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["predictions"]) == 3
    assert main(["eval", str(newest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == whole.metrics["test"]["accuracy"]


def test_a_whole_model_needs_no_hub_or_file_to_be_loaded(recipe: dict[str, Any], tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    options = {key: value for key, value in recipe["model"].items() if key not in ("name", "pretrained")}
    save_for_hf(timm.create_model(recipe["model"]["name"], **options), str(tmp_path / "hub"), model_args=options)
    (tmp_path / "hub").rename(tmp_path / "there")
    recipe = {**recipe, "model": {"name": f"local-dir:{tmp_path / 'there'}"}, "schedule": {"epochs": 1}}
    result = train(recipe, work_dir=tmp_path / "run", quiet=True)
    (tmp_path / "there").rename(tmp_path / "gone")
    assert evaluate(tmp_path / "run") == result.metrics["test"]


def test_one_class_and_folders_of_masks_are_no_classes(
    command: list[str], image_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    picture = image_folder / "train" / "left" / "0.png"
    for folder in ("alone/left", "pairs/images", "pairs/masks"):
        Path(folder).mkdir(parents=True)
        for number in range(4):
            shutil.copy(picture, Path(folder, f"{number}.png"))
    train_on = ["train", "classification/digits_vpt", "--work-dir", "run2", "--data"]
    assert "at least two classes" in message(capsys, *train_on, "alone")
    assert "vizattn list --recipes segmentation" in message(capsys, *train_on, "pairs")
