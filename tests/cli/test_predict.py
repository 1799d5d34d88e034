"""`vizattn predict`: on a bundle of an untrained adapter, whose predictions are compared with the model's own."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vizattn
from vizattn.cli import main
from vizattn.data import build_dataset, build_transforms, preprocessing_of

Capture = pytest.CaptureFixture[str]
CLASSES = ["nought", "one", "two", "three, thrice"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=len(CLASSES))
    vizattn.attach(model, "vpt", num_tokens=2)
    torch.nn.init.normal_(model.get_classifier().weight)  # type: ignore[operator]
    folder = tmp_path_factory.mktemp("run") / "bundle"
    vizattn.save_adapter(model, folder, class_names=CLASSES, preprocessing=preprocessing_of(model))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    digits = build_dataset("digits", "test")
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, i in (("a.png", 0), ("b.png", 1), ("more/c.png", 2)):
        digits[i][0].save(folder / name)
    return folder


def predict_json(capsys: Capture, *argv: object) -> list[dict]:
    assert main(["predict", *map(str, argv), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_folder_gives_what_the_model_gives(bundle: Path, pictures: Path, capsys: Capture) -> None:
    results = predict_json(capsys, pictures, "--bundle", bundle, "--batch-size", 2)
    assert [result["image"] for result in results] == [str(pictures / n) for n in ("a.png", "b.png", "more/c.png")]

    model = vizattn.adapters.create_from_bundle(bundle)
    transform = build_transforms(preprocessing_of(model), train=False)
    images = torch.stack([transform(Image.open(result["image"]).convert("RGB")) for result in results])
    with torch.no_grad():
        probabilities = model(images).softmax(-1)
    for result, row in zip(results, probabilities):
        assert [p["class"] for p in result["predictions"]] == [CLASSES[i] for i in row.argsort(descending=True)]
        best = result["predictions"][0]["probability"]
        assert best == pytest.approx(row.max().item(), abs=1e-5)


def test_globs_files_and_repetitions(bundle: Path, pictures: Path, capsys: Capture) -> None:
    results = predict_json(capsys, pictures / "*.png", pictures / "a.png", "--bundle", bundle, "--top-k", 1)
    assert [Path(result["image"]).name for result in results] == ["a.png", "b.png"]
    assert all(len(result["predictions"]) == 1 for result in results)


def test_a_training_run_is_taken_for_its_bundle(bundle: Path, pictures: Path, capsys: Capture) -> None:
    one = predict_json(capsys, pictures / "a.png", "--bundle", bundle)
    assert one == predict_json(capsys, pictures / "a.png", "--bundle", bundle.parent)


def test_table_and_csv(bundle: Path, pictures: Path, capsys: Capture, tmp_path: Path) -> None:
    assert main(["predict", str(pictures), "--bundle", str(bundle)]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 4 and " %" in table

    file = tmp_path / "out.csv"
    assert main(["predict", str(pictures), "--bundle", str(bundle), "--format", "csv", "--output", str(file)]) == 0
    assert capsys.readouterr().out == ""
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert len(rows) == 3 * len(CLASSES)
    assert {row["class"] for row in rows} == set(CLASSES)
    assert list(tmp_path.glob(".*")) == []


def test_unreadable_images_are_named_and_the_others_go_on(bundle: Path, pictures: Path, capsys: Capture) -> None:
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    (pictures / "text.jpg").write_text("not an image")
    assert main(["predict", str(pictures), "--bundle", str(bundle), "--format", "json"]) == 1
    out, err = capsys.readouterr()
    results = {Path(result["image"]).name: result for result in json.loads(out)}
    assert "error" in results["broken.png"] and results["text.jpg"]["error"] == "not an image file"
    assert "predictions" in results["a.png"] and "predictions" in results["c.png"]
    assert "broken.png" in err and "text.jpg" in err and "2 of 5 images could not be read." in err


def test_odd_images_are_read(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    photo = Image.effect_noise((40, 32), 90).convert("RGB")
    frames = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("P").save(tmp_path / "palette.png")
    photo.convert("RGBA").save(tmp_path / "alpha.webp")
    Image.fromarray(np.arange(1280, dtype=np.uint16).reshape(32, 40) * 50).save(tmp_path / "deep.png")
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.save(tmp_path / "moving.gif", **frames)
    photo.save(tmp_path / "moving.png", **frames)
    photo.save(tmp_path / "moving.webp", **frames)
    photo.save(tmp_path / "pages.tiff", **frames)
    photo.save(tmp_path / "photo.mpo", **frames)
    assert (
        main(["predict", str(tmp_path), str(tmp_path / "photo.mpo"), "--bundle", str(bundle), "--format", "json"]) == 0
    )
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert len(results) == 10 and all(len(result["predictions"]) == 4 for result in results)
    noted = {Path(result["image"]).name for result in results if "note" in result}
    assert noted == {"moving.gif", "moving.png", "moving.webp", "pages.tiff"}  # of MPO the rest are previews
    assert f"Of 4 of the files only the first of several frames was taken, as of {tmp_path / 'moving.gif'}." in err


def test_what_is_no_image_is_named_in_one_line(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGB", (2, 300)).save(tmp_path / "sliver.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    files = map(str, sorted(tmp_path.glob("*.*")))
    assert main(["predict", *files, "--bundle", str(bundle), "--format", "csv"]) == 1
    out, err = capsys.readouterr()
    assert [row["image"] for row in csv.DictReader(io.StringIO(out)) if row["class"]] == [
        str(tmp_path / "good.png")
    ] * 4
    said = dict(line.removeprefix("Cannot read ").split(": ", 1) for line in err.splitlines()[:-1] if ": " in line)
    said = {Path(path).name: why for path, why in said.items()}
    assert said == {
        "huge.png": "200000000 pixels are too many to decode",
        "empty.jpg": "the file is empty",
        "gone.png": "No such file or directory",
        "pipe.png": "not a regular file",
        "sliver.png": "2 x 300 pixels: a side is over 100 times the other",
    }
    assert err.splitlines()[-1] == "5 of 6 images could not be read."


def test_names_of_files_steer_no_terminal(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "two\nlines.png")
    (tmp_path / "red\x1b[31m.png").touch()
    assert main(["predict", str(tmp_path), "--bundle", str(bundle), "--top-k", "1"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "two\\nlines.png" in out and "red\\x1b[31m.png" in out
    assert "\x1b" not in out + err and "red\\x1b[31m.png: the file is empty" in err


def test_overlays_show_the_picture_with_its_classes(bundle: Path, pictures: Path, capsys: Capture) -> None:
    out = pictures / "shown"
    Image.new("RGB", (3000, 1500), "red").save(pictures / "large.png")
    results = predict_json(capsys, pictures, "--bundle", bundle, "--save-overlay", out, "--batch-size", 3)
    assert sorted(path.name for path in out.iterdir()) == [f"{n}_overlay.png" for n in ("a", "b", "c", "large")]
    small, large = (Image.open(result["overlay"]) for result in (results[0], results[2]))
    assert small.width >= 224 and small.height > 224
    assert large.width == 1024 and large.height > 512 and large.getpixel((1000, 500)) == (255, 0, 0)
    below = np.asarray(small)[-60:]
    assert (below == 0).any() and (below == 255).mean() > 0.5  # text

    (pictures / "a_overlay.png").write_bytes((pictures / "a.png").read_bytes())
    argv = ["predict", str(pictures / "a.png"), str(pictures / "a_overlay.png"), "--bundle", str(bundle)]
    assert main([*argv, "--save-overlay", str(pictures)]) == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_memory_that_is_not_there(
    bundle: Path, pictures: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("torch.stack", fail)
    assert main(["predict", str(pictures), "--bundle", str(bundle)]) == 2
    assert "not enough memory for 3 images at a time: lower --batch-size" in capsys.readouterr().err


def test_missing_inputs_are_mistakes(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["predict", "nothing*.png", "--bundle", str(bundle)]) == 2
    assert "nothing*.png" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), "--bundle", str(bundle)]) == 2
    assert "There are no images below" in capsys.readouterr().err


def test_not_a_bundle(pictures: Path, capsys: Capture) -> None:
    assert main(["predict", str(pictures), "--bundle", str(pictures)]) == 2
    assert str(pictures) in capsys.readouterr().err


def test_damaged_bundle(bundle: Path, pictures: Path, tmp_path: Path, capsys: Capture) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["predict", str(pictures), "--bundle", str(damaged)]) == 2
    assert str(damaged) in capsys.readouterr().err
    shutil.copytree(bundle, damaged, dirs_exist_ok=True)
    config = json.loads((damaged / "adapter_config.json").read_text())
    config["backbone"]["args"]["global_pool"] = ""  # maps in the place of logits
    (damaged / "adapter_config.json").write_text(json.dumps(config))
    assert main(["predict", str(pictures), "--bundle", str(damaged)]) == 2
    assert "not one for each of its 4 classes" in capsys.readouterr().err


def test_unusable_device_and_output(bundle: Path, pictures: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["predict", str(pictures), "--bundle", str(bundle), "--device", "gpu"]) == 2
    assert "'gpu'" in capsys.readouterr().err
    assert main(["predict", str(pictures), "--bundle", str(bundle), "--output", str(tmp_path / "no" / "x.csv")]) == 2
    assert "There is no folder" in capsys.readouterr().err
