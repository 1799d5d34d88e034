"""Exported files: run elsewhere they are the model, they say what they need, and they appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vizattn
from vizattn import VizattnError
from vizattn.cli import main
from vizattn.data import build_dataset, preprocessing_of
from vizattn.engine import Trained, export
from vizattn.engine.export import PixelLogits, export_model
from vizattn.engine.onnx_model import OnnxModel
from vizattn.heads.inference import predict_map

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
CLASSES = [f"digit {i}" for i in range(10)]
METHODS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "linear_probe": [("linear_probe", {})],
    "full": [("full", {})],
    "vpt": [("vpt", {"num_tokens": 3})],
    "vpt_shallow": [("vpt", {"num_tokens": 3, "deep": False})],
    "apla": [("apla", {"num_rows": 5})],
    "hst": [("hst", {"widths": (8, 8, 16, 16), "num_heads": (2, 2, 4, 4)})],
    "side_tuning": [("side_tuning", {"width": 8})],
    "efficient_probing": [("efficient_probing", {"num_queries": 4})],
    "vpt+efficient_probing": [("vpt", {"num_tokens": 3}), ("efficient_probing", {"num_queries": 4})],
}


def few(methods: Any, *quick: str) -> Any:
    """All methods; those that are not quick in the slow tests only."""
    return pytest.mark.parametrize(
        "method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in quick)) for m in methods]
    )


def trained(method: str | None = None, config: dict[str, Any] | None = None, name: str | None = None) -> Trained:
    """A tiny classifier with a method of `METHODS`; what trains is not at its initial value."""
    torch.manual_seed(0)
    kwargs = {} if name else TINY
    model = timm.create_model(name or "vit_va_nano_patch4_32", num_classes=10, **kwargs)
    for adapter, options in METHODS[method] if method else []:
        vizattn.attach(model, adapter, **options)
    moved(model)
    return Trained(model.eval(), CLASSES, preprocessing_of(model), config)


def trained_segmenter(name: str = "vit_va_nano_patch4_32", **kwargs: Any) -> Trained:
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, **kwargs)
    vizattn.attach(backbone, "apla", num_rows=4)
    model = vizattn.Segmenter(backbone, 8, head="linear")
    moved(model)
    names = list(build_dataset("scenes", "test", length=1).class_names)  # type: ignore[attr-defined]
    config = {"task": "segmentation", "model": {"name": name}, "head": {"name": "linear"}}
    config["data"] = {"name": "scenes", "length": 6, "crop_size": [64, 48], "short_side": 64}
    return Trained(model.eval(), names, preprocessing_of(timm.create_model(name)), config)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


@few(METHODS)
def test_torch_files_of_every_method(method: str, tmp_path: Path) -> None:
    model = trained(method)
    exported = export_model(model, tmp_path / "model.pt2", format="torch")
    assert exported.adapters == [name for name, _ in METHODS[method]]
    assert exported.difference <= 1e-5 and exported.largest > 0.01
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    notes = json.loads(extra["metadata.json"])
    assert json.loads(notes["class_names"]) == CLASSES and notes["task"] == "classification"
    for size in ((32, 32), (47, 40)) if exported.any_size else ((32, 32),):
        x = images(5, *size)
        torch.testing.assert_close(logits(program, x), logits(model.model, x), rtol=1e-4, atol=1e-5)


@few(METHODS, "vpt+efficient_probing")
def test_onnx_files_of_every_method(method: str, tmp_path: Path) -> None:
    model = trained(method)
    exported = export_model(model, tmp_path / "model.onnx")
    assert exported.any_size == (method != "hst") and (exported.why_fixed is None) == exported.any_size
    run = OnnxModel((tmp_path / "model.onnx").read_bytes())
    for size in ((32, 32), (47, 40)) if exported.any_size else ((32, 32),):
        x = images(5, *size)
        torch.testing.assert_close(run(x), logits(model.model, x), rtol=1e-3, atol=1e-5)
    props = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert props["backbone"].startswith("vit_va_nano_patch4_32") and props["vizattn_version"] == vizattn.__version__
    assert json.loads(props["adapters"]) == exported.adapters
    assert json.loads(props["preprocessing"]) == model.preprocessing
    assert json.loads(props["class_names"]) == CLASSES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]  # no weights beside it


SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
BEIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), [("swin_tiny_patch4_window7_224", SWIN), ("beit_base_patch16_224", BEIT)])
def test_onnx_files_of_attention_with_position_biases(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    preprocessing = {**preprocessing_of(model), "input_size": [3, 32, 32]}
    exported = export_model(Trained(model, CLASSES, preprocessing, None), tmp_path / "model.onnx")
    assert not exported.any_size
    x = images(5, 32, 32)
    found = OnnxModel((tmp_path / "model.onnx").read_bytes())(x)
    torch.testing.assert_close(found, logits(model, x), rtol=1e-3, atol=1e-5)


def test_merged_files_are_the_adapted_model(tmp_path: Path) -> None:
    model = trained("apla")
    x = images(3, 32, 32)
    before = logits(model.model, x)
    exported = export_model(model, tmp_path / "model.pt2", format="torch", merge=True)
    assert exported.adapters == []
    program = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(logits(program.module(), x), before, rtol=1e-4, atol=1e-5)
    assert not [name for name in program.state_dict if "rows" in name]
    with pytest.raises(VizattnError, match="'vpt' cannot be merged: prompts"):
        export_model(trained("vpt"), tmp_path / "other.pt2", format="torch", merge=True)
    assert not (tmp_path / "other.pt2").exists()


def test_segmenters_give_logits_for_each_pixel(tmp_path: Path) -> None:
    model = trained_segmenter(**TINY)
    exported = export_model(model, tmp_path / "model.onnx", int8=True, data={"data.length": 4})
    assert exported.size == (64, 48) and not exported.any_size
    run = OnnxModel((tmp_path / "model.onnx").read_bytes())
    props = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert props["task"] == "segmentation" and json.loads(props["preprocessing"])["short_side"] == 64
    assert exported.int8 is not None and exported.int8["metric"] == "miou" and exported.int8["samples"] == 4
    assert json.loads(props["int8"]) == exported.int8
    assert run(images(2, 64, 48)).shape == (2, 8, 64, 48)
    x = images(1, 45, 70)
    pixels = logits(PixelLogits(model.model).eval(), x)  # type: ignore[arg-type]
    assert pixels.shape == (1, 8, 45, 70)
    assert torch.equal(pixels.argmax(1)[0], predict_map(model.model, x[0]).long())


def test_models_of_one_size_say_so(tmp_path: Path) -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **kwargs).eval()
    preprocessing = {**preprocessing_of(model), "input_size": [3, 32, 32]}
    exported = export_model(Trained(model, CLASSES, preprocessing, None), tmp_path / "model.pt2", format="torch")
    assert not exported.any_size and "the model takes no images of 48 x 40" in str(exported.why_fixed)


@pytest.mark.slow
def test_segmenters_of_one_size_are_measured_by_windows(tmp_path: Path) -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model = trained_segmenter("vit_tiny_patch16_224", **kwargs, out_indices=(1,))
    model.preprocessing["input_size"] = [3, 32, 32]
    model.config["data"]["crop_size"] = None  # type: ignore[index]
    exported = export_model(model, tmp_path / "model.onnx", int8=True)
    assert exported.size == (32, 32) and not exported.any_size
    assert exported.int8 is not None and exported.int8["samples"] == 6
    small = OnnxModel((tmp_path / "model.onnx").read_bytes(), (32, 32))
    assert small(images(2, 20, 31)).shape == (2, 8, 20, 31)


@pytest.mark.slow
def test_int8_is_smaller_and_measured(tmp_path: Path) -> None:
    model = trained("linear_probe", {"model": {"name": "vit_va_nano_patch4_32"}, "data": {"name": "digits"}})
    model.class_names = list("0123456789")
    found = export_model(model, tmp_path / "model.onnx", int8=True).int8
    assert found is not None and found["metric"] == "accuracy" and found["samples"] == 1297
    assert abs(found["int8"] - found["float32"]) < 0.1
    proto = onnx.load(tmp_path / "model.onnx")
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {node.op_type for node in proto.graph.node}
    assert (tmp_path / "model.onnx").stat().st_size == pytest.approx(1e6 * found["megabytes_int8"], rel=0.1)
    assert found["megabytes_int8"] < 0.8 * found["megabytes_float32"]


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    for options, message in (
        ({"format": "onxx"}, "Unknown format 'onxx'. Did you mean 'onnx'"),
        ({"format": "torch", "int8": True}, "int8 is for --format onnx"),
        ({"int8": True}, "name some with --data DIR"),
        ({"int8": True, "data": {"data.name": "folder", "data.root": str(tmp_path / "no")}}, "name some with --data"),
        ({"size": (33, 32), "format": "torch", "name": "swin_tiny_patch4_window7_224"}, "cannot be exported as torch"),
    ):
        name = options.pop("name", None)  # type: ignore[attr-defined]
        with pytest.raises(VizattnError, match=message):
            export_model(trained(name=name), tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file is there already, and stays."""
    make = export._torch

    def wrong(program: Any, notes: Any) -> Any:
        written, run = make(program, notes)
        return written, lambda x: run(x) + 0.01

    monkeypatch.setattr(export, "_torch", wrong)
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(VizattnError, match=r"is not the model: its logits differ by 0\.01"):
        export_model(trained(), tmp_path / "model.pt2", format="torch")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=3)
    vizattn.attach(model, "linear_probe")
    bundle = vizattn.save_adapter(
        model, tmp_path / "run" / "bundle", class_names=["a", "b", "c"], preprocessing=preprocessing_of(model)
    )
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(bundle), "--data", "x"]) == 2
    assert main(["export", str(bundle), "--size", "0", "3"]) == 2
    assert main(["export", str(tmp_path / "none")]) == 2
    assert main(["export", str(bundle), "--int8", "--data", str(tmp_path / "none")]) == 2
    assert "int8 is measured on images: name some with --data DIR" in capsys.readouterr().err
    folder = tmp_path / "photos"
    for name in "abc":
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), ord(name), np.uint8)).save(folder / name / "1.png")
    assert main(["export", str(bundle), "--int8", "--data", str(folder), "--merge"]) == 0
    out = capsys.readouterr().out
    assert "written  run.onnx" in out and "batch, height and width are free" in out and "3 classes" in out
    assert "on 3 images of all" in out and (tmp_path / "run.onnx").is_file()
