"""`vizattn weights`, and `--weights FILE` of the commands that build a model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import vizattn
from vizattn.cli import main
from vizattn.data import build_dataset, preprocessing_of
from vizattn.weights import cached_file, find

Capture = pytest.CaptureFixture[str]
NAME = "vit_va_nano_patch4_32"
KEY = f"{NAME}.glyphs"
PACKAGED = Path(vizattn.__file__).parent / "weights" / f"{NAME}.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VIZATTN_LOCK", raising=False)
    monkeypatch.delenv("VIZATTN_MIRROR", raising=False)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nano's weights are somewhere else than in the package, on a server that does not answer."""
    cfg = dataclasses.replace(find(NAME), file=None, url="http://127.0.0.1:1/nano.pth")
    for name in (NAME, KEY):
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, cfg)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Weights that differ from the packaged ones."""
    file = tmp_path / "other.safetensors"
    save_file({key: value.float() + 0.01 for key, value in load_file(PACKAGED).items()}, file)
    return file


def message(capsys: Capture, *argv: object, status: int = 2) -> str:
    assert main([*map(str, argv)]) == status
    return capsys.readouterr().err


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, vizattn_cli\n"
        "try: vizattn_cli.main(['weights', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'timm', 'rich', 'requests'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(action in run.stdout for action in ("list", "fetch", "verify", "convert", "path"))


def test_list(capsys: Capture) -> None:
    assert main(["weights", "list", "--json"]) == 0
    rows = {row["weights"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[KEY] | {"licence": ""} == {
        "weights": KEY,
        "here": "packaged",
        "licence": "",
        "megabytes": None,
        "sha256": None,
        "from": None,
    }
    row = rows["vit_va_tiny_patch16_224.augreg_in21k"]
    assert row["here"] == "no" and row["from"] == "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k"
    assert main(["weights", "list", "vit_va_tiny"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.usefixtures("published")
def test_fetch_verify_path(capsys: Capture) -> None:
    assert "is not here yet. Get it with: vizattn weights fetch" in message(capsys, "weights", "path", NAME)
    assert main(["weights", "fetch", NAME, "--from", str(PACKAGED)]) == 0
    assert capsys.readouterr().out == f"{cached_file(KEY)}\n"
    assert main(["weights", "path", NAME]) == 0
    assert capsys.readouterr().out == f"{cached_file(KEY)}\n"
    assert main(["weights", "list", NAME, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["here"] == "fetched" and len(row["sha256"]) == 12 and row["megabytes"] > 1
    assert main(["weights", "verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"weights": KEY, "state": "ok"}]
    damaged = bytearray(cached_file(KEY).read_bytes())
    damaged[-1] ^= 1
    cached_file(KEY).write_bytes(damaged)
    assert main(["weights", "verify"]) == 1
    assert "damaged; mend it with: vizattn weights fetch" in capsys.readouterr().out


@pytest.mark.usefixtures("published")
def test_a_server_that_cannot_be_reached(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vizattn.weights.download.time, "sleep", lambda seconds: None)
    text = message(capsys, "weights", "fetch", NAME)
    assert f"Fetching the weights {KEY} from http://127.0.0.1:1/nano.pth." in text
    assert "the connection failed" in text and "Trying again in 8 s." in text
    assert text.splitlines()[-1].endswith(f"vizattn weights fetch {KEY} --from FILE") and "Traceback" not in text


def test_what_is_packaged_needs_no_fetching(capsys: Capture) -> None:
    assert main(["weights", "verify"]) == 0
    assert capsys.readouterr().out == "Nothing has been fetched.\n"
    for action in ("path", "fetch"):
        assert main(["weights", action, NAME]) == 0
        assert capsys.readouterr().out == f"{PACKAGED}\n"


def test_convert(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {key: value.float() for key, value in load_file(PACKAGED).items()}
    torch.save({"model": state, "epoch": 3}, "released.pth")
    assert main(["weights", "convert", "released.pth", NAME]) == 0
    assert "Load it with pretrained_cfg_overlay={'file': 'vit_va_nano" in capsys.readouterr().out
    converted = load_file(f"{KEY}.safetensors")
    assert converted.keys() == state.keys() and all(torch.equal(converted[key], state[key]) for key in state)
    assert "is there already" in message(capsys, "weights", "convert", "released.pth", NAME)
    assert main(["weights", "convert", "released.pth", NAME, "--force"]) == 0
    assert main(["weights", "convert", "released.pth", NAME, "--output", "other.safetensors"]) == 0
    assert Path("other.safetensors").is_file()
    text = message(capsys, "weights", "convert", "released.pth", "vit_va_tiny_patch16_224", "--output", "x")
    assert "do not fit this VisionTransformer" in text and not Path("x").exists()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["fecth"], "Unknown action 'fecth'. Did you mean 'fetch'?"),
        (["fetch"], "Usage: vizattn weights fetch NAME ..."),
        (["path", "a", "b"], "Usage: vizattn weights path NAME"),
        (["convert", "a"], "Usage: vizattn weights convert FILE NAME"),
        (["convert", "gone.pth", NAME], "There is no file gone.pth."),
        (["fetch", NAME, "--output", "x"], "--output does not go with: vizattn weights fetch"),
        (["list", "--from", "x"], "--from does not go with: vizattn weights list"),
        (["fetch", "vit_va_tiny_patch16_224.augreg_in22k"], "Did you mean 'vit_va_tiny_patch16_224.augreg_in21k'"),
        (["fetch", "vit_va_tinny_patch16_224"], "Did you mean 'vit_va_tiny_patch16_224'"),
        (["verify", "resnet50"], "Unknown weights 'resnet50'."),
        (["list", "nothing_like_it"], "List them with: vizattn weights list"),
        (["fetch", NAME, "vit_va_tiny_patch16_224", "--from", "x"], "--from gives one file"),
    ],
)
def test_mistakes(argv: list[str], expected: str, capsys: Capture) -> None:
    assert expected in message(capsys, "weights", *argv)


def test_train_from_a_file(other: Path, capsys: Capture) -> None:
    import argparse

    from vizattn.cli import train
    from vizattn.engine import load_recipe
    from vizattn.engine.config import apply_overrides, resolve_config
    from vizattn.engine.models import build_model

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(["classification/digits_full", "--weights", str(other)])
    config = resolve_config(apply_overrides(load_recipe(args.config), train.overrides_of(args)))
    model = build_model(config, 10)
    assert torch.equal(model.norm.weight, load_file(other)["norm.weight"])  # type: ignore[union-attr]
    expected = "There is no file of weights gone.pth."
    assert expected in message(capsys, "train", "classification/digits_full", "--weights", "gone.pth")
    text = message(capsys, "train", "classification/digits_vpt", "--weights", other)
    assert "vizattn weights fetch NAME --from FILE" in text, "the bundle could not name them"


def test_eval_of_a_file(other: Path, capsys: Capture) -> None:
    argv = ["eval", "classification/glyphs_pretrain", "--pretrained", "--json", "--split", "val"]
    options = ["--cfg-options", "data.length=104"]
    losses = []
    for weights in (PACKAGED, other):
        assert main([*argv, "--weights", str(weights), *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1]
    assert "There is no file of weights gone" in message(capsys, *argv, "--weights", "gone")


def test_predict_with_the_backbone_of_a_file(other: Path, tmp_path: Path, capsys: Capture) -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=2)
    vizattn.attach(model, "linear_probe")
    bundle = tmp_path / "bundle"
    vizattn.save_adapter(model, bundle, class_names=["a", "b"], preprocessing=preprocessing_of(model))
    build_dataset("digits", "test")[0][0].save(tmp_path / "x.png")
    argv = ["predict", tmp_path / "x.png", "--bundle", bundle, "--format", "json"]
    outputs = []
    copy = shutil.copy(PACKAGED, tmp_path / "copy.safetensors")
    for more in ([], ["--weights", copy]):
        assert main([*map(str, argv), *map(str, more)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "trained on other weights" in message(capsys, *argv, "--weights", other)
    assert "no file of weights gone" in message(capsys, *argv, "--weights", "gone")
    assert "only a bundle lacks weights" in message(capsys, *argv[:3], tmp_path / "home", "--weights", copy)
