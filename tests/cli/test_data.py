"""`vizattn data check`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vizattn.cli import main
from vizattn.cli.train import add_arguments, overrides_of
from vizattn.data.audit import audit
from vizattn.engine import load_recipe
from vizattn.engine.config import apply_overrides, resolve_config
from vizattn.errors import VizattnError

Capture = pytest.CaptureFixture[str]


def save(root: Path, split: str, name: str, labels: np.ndarray) -> None:
    for folder in ("images", "masks"):
        (root / split / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", labels.shape[::-1], "grey").save(root / split / "images" / f"{name}.jpg")
    Image.fromarray(labels.astype(np.uint8)).save(root / split / "masks" / f"{name}.png")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Two splits of 40 x 60 pixels with three classes, a tenth of them ignored."""
    labels = np.repeat([0, 1, 1, 1, 2, 2, 2, 2, 2, 255], 4)[:, None].repeat(60, axis=1)
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(tmp_path, split, f"{i}", labels)
    (tmp_path / "classes.txt").write_text("ground\ncat\ndog\n")
    return tmp_path


def parsed(command: list[str]) -> argparse.Namespace:
    """The options of `vizattn train ...`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(command[1:])


def test_a_sound_folder_needs_nothing(sound: Path, capsys: Capture) -> None:
    assert main(["data", "check", str(sound)]) == 0
    text = capsys.readouterr().out
    assert text.endswith(
        f"Ready: 4 of 4 images can be used. Train with, for example:\n"
        f"  vizattn train segmentation/scenes_vit_hst --data {sound}\n"
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "cat", "3", "1", "30", "30"] in lines
    assert "4 of mode L" in text and "height  40 to 40 (median 40)" in text and "width   60 to 60 (median 60)" in text


def test_json_counts_every_pixel(sound: Path, capsys: Capture) -> None:
    assert main(["data", "check", str(sound), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["layout"] == "folders" and found["class_names"] == ["ground", "cat", "dog"]
    expected = {"pairs": 3, "pixels": [720, 2160, 3600], "images": [3, 3, 3], "ignored": 720}
    assert found["splits"]["train"] == expected and found["splits"]["val"]["pairs"] == 1
    assert found["advice"] == []


def test_everything_wrong_is_named(sound: Path, capsys: Capture) -> None:
    images, masks = sound / "train" / "images", sound / "train" / "masks"
    save(sound, "train", "high", np.full((40, 60), 7))
    save(sound, "train", "void", np.full((40, 60), 255))
    save(sound, "train", "large", np.zeros((90, 70)))
    save(sound, "train", "lonely", np.zeros((40, 60)))
    (masks / "lonely.png").unlink()
    save(sound, "train", "orphan", np.zeros((40, 60)))
    (images / "orphan.jpg").unlink()
    save(sound, "val", "cut", np.random.default_rng(0).integers(0, 3, (40, 60)))
    cut = sound / "val" / "masks" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:200])
    save(sound, "val", "other", np.zeros((40, 60)))
    Image.new("L", (41, 60)).save(sound / "val" / "masks" / "other.png")

    found = audit(sound)
    assert not found.ok
    assert {Path(path).stem for path in found.unusable} == {"lonely", "cut", "other"}
    assert (
        found.unusable[str(sound / "val" / "images" / "other.jpg")] == "the image has 60 x 40 pixels, its mask 41 x 60"
    )
    assert [Path(path).stem for path in found.masks_without_image] == ["orphan"]
    assert found.out_of_range == {str(masks / "high.png"): [7]}
    assert found.all_ignored == [str(masks / "void.png")]
    advice = "\n".join(found.advice)
    assert "Labels go up to 7, but there are 3 classes: name 8" in advice
    assert "Images that cannot be used: 3." in advice and "Masks without an image: 1." in advice
    assert "data.crop_size, such as 32" in advice and "Masks that ignore every pixel: 1." in advice

    assert main(["data", "check", str(sound)]) == 1
    text = capsys.readouterr().out
    assert all(f"{name}." in text for name in ("high", "void", "lonely", "orphan", "cut", "other"))
    assert "cannot be used: 3" in text and str(masks / "high.png") + ": 7" in text
    assert text.endswith("Not ready: training would stop at labels that are no class.\n")


def test_labels_from_one_on(sound: Path, capsys: Capture) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(sound, split, f"{i}", np.repeat([1, 2, 3, 3], 10)[:, None].repeat(60, axis=1))
    assert main(["data", "check", str(sound)]) == 1
    assert "No mask has label 0: if the labels begin at 1, set data.reduce_zero_label=True" in capsys.readouterr().out
    assert main(["data", "check", str(sound), "--reduce-zero-label"]) == 0
    assert capsys.readouterr().out.endswith(f"--data {sound} --cfg-options data.reduce_zero_label=True\n")


def test_masks_of_0_and_255(sound: Path) -> None:
    (sound / "classes.txt").unlink()
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(sound, split, f"{i}", np.tile([0, 255], (40, 30)))
    found = audit(sound)
    assert any("fewer than two classes, as 255 is ignored" in sentence for sentence in found.advice) and not found.ok


def test_labels_beyond_what_masks_hold(sound: Path) -> None:
    wide = np.zeros((40, 60), dtype=np.uint16)
    wide[0] = 300
    Image.fromarray(wide).save(sound / "train" / "masks" / "0.png")
    assert any("at most 255 fit into masks" in sentence for sentence in audit(sound).advice)


def test_a_mask_that_lies_as_its_image_is_stored(sound: Path) -> None:
    path, exif = sound / "train" / "images" / "0.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    found = audit(sound)
    assert found.ok and found.as_stored == [str(path)] and "do not follow their EXIF orientation" in found.advice[0]


def test_the_command_that_is_told_works(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    """Also with names from a file, and images that differ in size."""
    save(sound, "train", "large", np.tile([0, 1], (50, 35)))
    (sound / "classes.txt").rename(tmp_path / "names")
    assert main(["data", "check", str(sound), "--classes", str(tmp_path / "names")]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[-2:] == ["data.crop_size=32", "data.class_names=['ground', 'cat', 'dog']"]
    config = resolve_config(apply_overrides(load_recipe(command[2]), overrides_of(parsed(command[1:]))))
    assert config["data"]["crop_size"] == 32 and config["data"]["class_names"] == ["ground", "cat", "dog"]


def test_a_recipe_of_ade20k_on_another_layout(sound: Path) -> None:
    """What the recipe says of ADE20K's folders and labels does not hold there, unless it is said again."""
    name = "segmentation/upernet_biformer_tiny"
    data = overrides_of(parsed(["train", name, "--data", str(sound)]))
    assert data["data.layout"] == "auto" and data["data.reduce_zero_label"] is False
    again = overrides_of(parsed(["train", name, "--data", str(sound), "--cfg-options", "data.reduce_zero_label=True"]))
    assert again["data.reduce_zero_label"] is True
    with pytest.raises(VizattnError, match="no images with masks in the layout 'ade20k'"):
        audit(sound, layout="ade20k")
    for kind, old in (("images", "images"), ("annotations", "masks")):
        for split, part in (("training", "train"), ("validation", "val")):
            (sound / kind).mkdir(exist_ok=True)
            (sound / part / old).rename(sound / kind / split)
    assert "data.layout" not in overrides_of(parsed(["train", name, "--data", str(sound)]))


def test_palettes_that_differ(sound: Path) -> None:
    paths = sorted((sound / "train" / "masks").iterdir())
    for path in paths:
        image = Image.open(path)
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255] + [9] * 759)
        image.save(path)
    assert audit(sound).advice == [] and audit(sound).mask_modes == {"P": 3, "L": 1}
    image.putpalette([0, 0, 0, 0, 0, 255, 255, 0, 0] + [9] * 759)
    image.save(paths[-1])
    (sentence,) = audit(sound).advice
    assert f"palettes of {paths[0]} and {paths[-1]} differ" in sentence


def test_classes_that_a_split_lacks_and_names_from_a_file(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    names = tmp_path / "names.txt"
    names.write_text("0: ground\n1: cat\n2: dog\n3: unicorn\n")
    assert main(["data", "check", str(sound), "--classes", str(names)]) == 0
    text = capsys.readouterr().out
    assert "- No pixel of train is unicorn." in text and "- No pixel of val is unicorn." in text


def test_unnamed_classes_and_a_missing_split(tmp_path: Path) -> None:
    save(tmp_path, "train", "one", np.tile([0, 1], (8, 4)))
    found = audit(tmp_path)
    assert found.ok and found.class_names == ["class 0", "class 1"]
    assert any("classes.txt" in sentence for sentence in found.advice)
    assert "There is no val split." in found.advice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "vok"], "Did you mean 'voc'"),
        (["--classes", "nowhere.txt"], "No such file"),
        (["--layuot", "voc"], "Did you mean '--layout'"),
    ],
)
def test_mistakes_end_with_2(sound: Path, capsys: Capture, options: list[str], message: str) -> None:
    try:
        status = main(["data", "check", str(sound), *options])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
