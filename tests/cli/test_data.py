"""`vizattn data check`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vizattn.cli import main
from vizattn.data.audit import audit

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


def test_a_sound_folder_needs_nothing(sound: Path, capsys: Capture) -> None:
    assert main(["data", "check", str(sound)]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("Nothing to do.")
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


def test_labels_from_one_on(sound: Path, capsys: Capture) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(sound, split, f"{i}", np.repeat([1, 2, 3, 3], 10)[:, None].repeat(60, axis=1))
    assert main(["data", "check", str(sound)]) == 1
    assert "No mask has label 0: if the labels begin at 1, set data.reduce_zero_label=True" in capsys.readouterr().out
    assert main(["data", "check", str(sound), "--reduce-zero-label"]) == 0
    assert "Nothing to do." in capsys.readouterr().out


def test_masks_of_0_and_255(sound: Path) -> None:
    (sound / "classes.txt").unlink()
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(sound, split, f"{i}", np.tile([0, 255], (40, 30)))
    assert any("fewer than two classes, as 255 is ignored" in sentence for sentence in audit(sound).advice)


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
