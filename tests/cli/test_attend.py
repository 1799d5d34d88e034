"""`vizattn attend`: the page, the pictures, and what is wrong said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vizattn
from vizattn.cli import main
from vizattn.data import build_dataset, preprocessing_of

Capture = pytest.CaptureFixture[str]
NAME = "vit_va_nano_patch4_32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A letter, two bundles and the file of a model without attention."""
    folder = tmp_path_factory.mktemp("attend")
    build_dataset("glyphs", "test")[11][0].save(folder / "letter.png")
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=True, num_classes=3)
    vizattn.attach(model, "vpt", num_tokens=2)
    vizattn.attach(model, "efficient_probing", num_queries=4)
    vizattn.save_adapter(model, folder / "bundle", class_names=list("abc"), preprocessing=preprocessing_of(model))

    backbone = timm.create_model("nat_nano", pretrained=True, features_only=True)
    vizattn.attach(backbone, "linear_probe")
    preprocessing = preprocessing_of(timm.create_model("nat_nano"))
    segmenter = vizattn.Segmenter(backbone, num_classes=3, head="linear")
    vizattn.save_adapter(segmenter, folder / "segmenter", class_names=list("xyz"), preprocessing=preprocessing)
    save_file(timm.create_model("resnet10t").state_dict(), folder / "resnet.safetensors")
    return folder


def attend(folder: Path, *argv: object) -> int:
    return main(["attend", str(folder / "letter.png"), *map(str, argv)])


def test_a_backbone_with_its_own_classes(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "page"
    assert attend(folder, "--model", NAME, "--out", out) == 0
    said = capsys.readouterr().out
    assert said.split()[2] == "L"  # the letter that was drawn
    assert f"{out / 'index.html'}  the page; with 10 pictures beside it" in said
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["index.html", "layer-00-blocks.0.attn.png"]
    assert names[-4:-2] == ["whole-0-rollout.png", "whole-1-relevance-for-L.png"]
    assert "<td>L</td>" in (out / "index.html").read_text("utf-8")


def test_a_bundle(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert attend(folder, "--bundle", folder / "bundle", "--model", NAME, "--out", tmp_path) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[:3]} == {"a", "b", "c"}
    assert (tmp_path / "layer-06-adapters.efficient_probing.probe.png").is_file()


def test_a_segmenter(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert attend(folder, "--bundle", folder / "segmenter", "--out", tmp_path) == 0
    shares = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert "share of the pixels" in (tmp_path / "index.html").read_text("utf-8")
    assert not list(tmp_path.glob("whole-*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model NAME, or what was trained with --bundle DIR"),
        (["--model", "vit_va_nano"], "Unknown model 'vit_va_nano'. Did you mean"),
        (["--model", "halonet_va_h1"], "halonet_va_h1"),
        (["--model", NAME, "--weights", "nowhere.pth"], "There is no file of weights nowhere.pth"),
        (["--model", "nat_nano", "--bundle", "{}/bundle"], f"is a {NAME}, not a nat_nano"),
        (["--bundle", "{}/empty"], "There is no trained model in"),
        (["--model", "resnet10t", "--weights", "{}/resnet.safetensors"], "No attention maps are known of ResNet"),
        (["--model", NAME, "--device", "tpu"], "tpu"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, capsys: Capture, argv: list[str], message: str) -> None:
    out = tmp_path / "out"
    assert attend(folder, *(a.format(folder) for a in argv), "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize("content", [None, b"", b"no picture", "folder"])
def test_what_is_no_image(tmp_path: Path, capsys: Capture, content: bytes | str | None) -> None:
    path = tmp_path / "image.png"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert main(["attend", str(path), "--model", NAME, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"vizattn attend: Cannot read {path}: ")


def test_the_image_is_not_overwritten(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "whole-0-rollout.png"
    path.write_bytes((folder / "letter.png").read_bytes())
    assert main(["attend", str(path), "--model", NAME, "--out", str(tmp_path)]) == 2
    assert "could be overwritten" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert attend(folder, "--model", NAME, "--out", tmp_path / "file" / "out") == 2
    assert "choose another folder with --out" in capsys.readouterr().err
