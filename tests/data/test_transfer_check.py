"""What `check` finds, and what `prepare` makes."""

import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vizattn.data.transfer import TransferTask, check, get_suite, open_split, prepare, render
from vizattn.data.transfer.preparing import PROVENANCE
from vizattn.data.transfer.tasks import Suite
from vizattn.errors import VizattnError

SPRITES = replace(
    get_suite("vtab-1k").task("dsprites_loc"), splits={"train": (16,), "val": (4,), "trainval": (20,), "test": (30,)}
)
SUITE = Suite("tiny", (SPRITES, TransferTask("other", "natural", 3, layout="lists")))


def found(root, **options):
    return check(SUITE, root / "vtab-1k", "dsprites_loc", **options)[0]


@pytest.fixture
def root(tmp_path):
    prepare(SPRITES, tmp_path)
    return tmp_path


def folder(root):
    return root / "vtab-1k" / "dsprites_loc"


def test_a_whole_task_is_ok_and_a_missing_one_is_told(root):
    steps = []
    report = check(SUITE, root / "vtab-1k", progress=lambda *step: steps.append(step))
    sprites, other = report
    assert other.status == "missing" and "no folder other" in other.missing
    assert {split: part.images for split, part in sprites.splits.items()} == {
        "train": 16,
        "val": 4,
        "trainval": 20,
        "test": 30,
    }
    assert not sprites.errors and all("has no image of class" in remark for remark in sprites.warnings)
    part = sprites.splits["test"]
    labels = open_split(SUITE, SPRITES, "test", root / "vtab-1k").labels
    assert part.histogram == [Counter(labels)[label] for label in range(16)]
    assert part.labels == (min(labels), max(labels)) and part.missing_classes == sorted(set(range(16)) - set(labels))
    assert part.heights == part.widths == (64, 64, 64)
    assert steps[-1] == ("dsprites_loc", 140, 140) and [done for _, done, _ in steps] == sorted(d for _, d, _ in steps)
    assert json.loads(json.dumps(sprites.to_dict()))["status"] == sprites.status
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    assert "64x64" in text and "other: missing: There is no folder other" in text


def test_unreadable_images_are_named_and_only_when_decoded(root):
    path = folder(root) / "images" / "val200" / "000002.png"
    path.write_bytes(path.read_bytes()[:60])
    report = found(root)
    assert report.status == "errors" and list(report.unreadable) == [str(path)]
    assert "1 images cannot be read" in report.errors[0] and "000002.png" in report.errors[0]
    assert not found(root, decode=False).errors


def test_damaged_lists_are_told_once_and_the_rest_is_still_looked_at(root):
    path = folder(root) / "train800.txt"
    path.write_text(path.read_text().replace("000003.png ", "000003.png x"))
    report = found(root, decode=False)
    assert len(report.errors) == 1 and "train800.txt, line 4" in report.errors[0]
    assert set(report.splits) == {"test"}


def test_counts_are_compared(root):
    path = folder(root) / "test.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert any("has 29 images; dsprites_loc has 30 in test" in remark for remark in found(root).warnings)


def test_images_in_two_splits_are_found_by_content(root):
    images = folder(root) / "images"
    (images / "test" / "000005.png").write_bytes((images / "train800" / "000001.png").read_bytes())
    assert "1 images of test have the same content as one of train." in found(root).warnings


def test_trainval_with_another_image_is_found_by_content(root):
    path = folder(root) / "images" / "train800val200" / "000001.png"
    Image.new("L", (64, 64), 77).save(path)
    report = found(root)
    assert "trainval is not train and val together" in report.errors[0] and "it has 1 others" in report.errors[0]


def test_built_in_tasks_are_checked_too():
    report = check("vtab-mini", tasks="digits")[0]
    assert report.status == "ok" and report.splits["test"].images == 797


def test_prepared_sprites_are_the_drawn_ones(root):
    parts = {
        split: open_split(SUITE, SPRITES, split, root / "vtab-1k") for split in ("train", "val", "trainval", "test")
    }
    mini = open_split("vtab-mini", "dsprites_loc", "train")  # the same order of the same images
    for index in range(16):
        assert np.array_equal(np.asarray(parts["train"][index][0]), np.asarray(mini[index][0]))
    assert parts["train"].labels == mini.labels[:16]
    assert parts["trainval"].labels == parts["train"].labels + parts["val"].labels
    about = json.loads((folder(root) / PROVENANCE).read_text())
    assert about["images"]["test"] == 30 and "selected by vizattn" in about["note"] and "of test" in about["note"]


def test_a_task_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(task, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SPRITES, tmp_path, progress=fail)
    assert not list((tmp_path / "vtab-1k").iterdir())
    assert prepare(SPRITES, tmp_path) == folder(tmp_path)
    before = (folder(tmp_path) / "test.txt").stat().st_mtime_ns
    with pytest.raises(VizattnError, match="is there already"):
        prepare(SPRITES, tmp_path)
    assert (folder(tmp_path) / "test.txt").stat().st_mtime_ns == before


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    old, young = (tmp_path / "vtab-1k" / f".dsprites_loc.{number}.tmp" for number in (1, 2))
    for path in (old, young):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepare(SPRITES, tmp_path)
    assert not old.exists() and young.exists()


def test_the_seed_selects_and_repeats(tmp_path):
    lists = [
        (prepare(SPRITES, tmp_path / str(i), seed=seed) / "test.txt").read_text() for i, seed in enumerate((0, 0, 1))
    ]
    assert lists[0] == lists[1] != lists[2]


@pytest.mark.parametrize("task", ["resisc45", "diabetic_retinopathy", "dmlab", "smallnorb_azi", "smallnorb_ele"])
def test_what_cannot_be_made_says_what_is_needed(task, tmp_path):
    with pytest.raises(VizattnError, match=rf"{task} cannot be made here. It needs .*train800.txt"):
        prepare(task, tmp_path)
    assert not list(tmp_path.iterdir())


def eurosat(source: Path, each: int) -> None:
    for label in range(10):
        place = source / "eurosat" / "2750" / f"class{label}"
        place.mkdir(parents=True)
        for index in range(each):
            Image.new("RGB", (4, 4), (label, index, 0)).save(place / f"{index}.png")


def test_a_source_without_splits_is_divided(tmp_path):
    eurosat(tmp_path / "source", 6)
    task = replace(get_suite("vtab-1k").task("eurosat"), splits={"train": (8,), "val": (2,), "test": (20,)})
    with pytest.raises(VizattnError, match=r"has 60 images \(all\); 6,400 are needed"):
        prepare("eurosat", tmp_path / "out", source=tmp_path / "source")
    assert not (tmp_path / "out").exists()
    made = prepare(task, tmp_path / "out", source=tmp_path / "source")
    suite = Suite("mine", (task,))
    parts = {split: open_split(suite, task, split, made.parent) for split in ("train", "val", "test", "trainval")}
    assert [len(part) for part in parts.values()] == [8, 2, 20, 10]
    assert parts["train"].class_names[3] == "class3" and (made / "classes.txt").is_file()
    digests = [part.digest(i) for split, part in parts.items() if split != "trainval" for i in range(len(part))]
    assert len(set(digests)) == 30  # the files are copied as they are, each once
    names = {(made.parent / path).read_bytes() for path in parts["train"].paths}
    assert names <= {path.read_bytes() for path in (tmp_path / "source").rglob("*.png")}


def test_a_missing_source_is_told(tmp_path):
    with pytest.raises(VizattnError, match=r"The source of dtd is not, or not whole, in .*nothing: "):
        prepare("dtd", tmp_path / "out", source=tmp_path / "nothing")


def test_a_source_with_splits_keeps_its_test_split(tmp_path, monkeypatch):
    from vizattn.data.transfer.sources import SOURCES, Pool, Pools

    def pool(shade, count):
        return Pool([i % 2 for i in range(count)], lambda place: Image.new("RGB", (4, 4), (shade, place, 0)))

    pools = Pools({"train": pool(1, 9), "val": pool(2, 9), "test": pool(3, 5)}, ["no", "yes"])
    monkeypatch.setitem(SOURCES, "patch_camelyon", lambda folder, download: pools)
    task = replace(get_suite("vtab-1k").task("patch_camelyon"), splits={"train": (6,), "val": (3,), "test": (5,)})
    prepare(task, tmp_path, source=tmp_path)
    suite = Suite("mine", (task,))
    shades = {split: open_split(suite, task, split, tmp_path / "vtab-1k") for split in ("train", "val", "test")}
    pixels = {split: [part[i][0].getpixel((0, 0))[:2] for i in range(len(part))] for split, part in shades.items()}
    assert pixels["test"] == [(3, place) for place in range(5)]
    assert {shade for shade, _ in pixels["train"]} == {1} and {shade for shade, _ in pixels["val"]} == {2}
    assert shades["test"].labels == [0, 1, 0, 1, 0]
    with pytest.raises(VizattnError, match="has 5 test images, not 6"):
        prepare(replace(task, splits={**task.splits, "test": (6,)}), tmp_path / "again", source=tmp_path)
