import os
import re
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vizattn.data import available_splits, build_dataset
from vizattn.data.folder import ImageFolder, has_split_folders
from vizattn.errors import VizattnError


def fill(folder, counts):
    """Class folders with that many small pictures; the class sets the colour."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (6, 5), (40 * label, i, 0)).save(folder / name / f"{i:03}.png")
    return folder


def names(dataset):
    return [os.path.relpath(path, dataset.root) for path in dataset.paths]


@pytest.fixture
def flat(tmp_path):
    return fill(tmp_path / "pets", {"dog": 20, "cat": 10, "Ant": 30})


@pytest.fixture
def split(tmp_path):
    for part, counts in (("train", (5, 6)), ("val", (2, 1)), ("test", (3, 0))):
        fill(tmp_path / "pets" / part, dict(zip(("cat", "dog"), counts)))
    return tmp_path / "pets"


def test_automatic_split_is_whole_stratified_and_fixed(flat):
    parts = {part: build_dataset("folder", part, root=flat) for part in ("train", "val", "test")}
    assert available_splits("folder", root=flat) == list(parts)
    assert all(part.class_names == ["Ant", "cat", "dog"] for part in parts.values())
    assert Counter(parts["test"].labels) == {0: 6, 1: 2, 2: 4}
    assert Counter(parts["val"].labels) == {0: 3, 1: 1, 2: 2}
    everything = [name for part in parts.values() for name in names(part)]
    assert sorted(everything) == sorted(str(path.relative_to(flat)) for path in flat.glob("*/*"))
    assert names(parts["val"]) == names(ImageFolder(flat, "val")) != names(ImageFolder(flat, "val", seed=1))


def test_automatic_split_does_not_depend_on_the_file_system_order(flat, monkeypatch):
    before = names(ImageFolder(flat, "train"))
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = iter(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(ImageFolder(flat, "train")) == before


def test_new_images_do_not_move_the_others(flat):
    before = set(names(ImageFolder(flat, "test", test_fraction=0.5, val_fraction=0)))
    fill(flat, {"dog": 22})
    after = set(names(ImageFolder(flat, "test", test_fraction=0.5, val_fraction=0)))
    assert len(before - after) <= 1


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (10, (7, 1, 2))])
def test_small_classes_are_shared_out(tmp_path, count, sizes):
    fill(tmp_path, {"a": count, "b": 10})
    found = [ImageFolder(tmp_path, part).labels.count(0) for part in ("train", "val", "test")]
    assert tuple(found) == sizes


def test_each_class_keeps_an_image_to_train_on(tmp_path):
    fill(tmp_path, {"a": 3, "b": 1, "c": 20})
    assert set(ImageFolder(tmp_path, "train", val_fraction=0.05, test_fraction=0.9).labels) == {0, 1, 2}


def test_split_folders_are_used(split):
    assert available_splits("folder", root=split) == ["train", "val", "test"]
    sizes = [len(ImageFolder(split, part)) for part in ("train", "val", "test")]
    assert sizes == [11, 3, 3]
    image, label = ImageFolder(split, "train", transform=np.asarray)[10]
    assert image.shape == (5, 6, 3) and image[0, 0].tolist() == [40, 5, 0] and label == 1


def test_val_is_split_off_train_where_it_is_missing(tmp_path):
    fill(tmp_path / "train", {"a": 10, "b": 10})
    assert available_splits("folder", root=tmp_path) == ["train", "val"]
    train, val = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "val")
    assert len(train) == 18 and len(val) == 2 and not set(names(train)) & set(names(val))
    with pytest.raises(VizattnError, match="no test split"):
        ImageFolder(tmp_path, "test")


def test_validation_is_another_name_for_val(split):
    os.rename(split / "val", split / "validation")
    assert len(ImageFolder(split, "val")) == 3 and len(ImageFolder(split, "train")) == 11


@pytest.mark.parametrize(
    ("part", "counts", "message"),
    [("val", {"bird": 1}, "has 'bird', which train lacks"), ("train", {"bird": 1}, "lacks 'bird', which train has")],
)
def test_classes_must_be_those_of_train(split, part, counts, message):
    fill(split / part, counts)
    with pytest.raises(VizattnError, match=message):
        ImageFolder(split, "train")


def test_missing_folder_shows_expected_and_found(tmp_path):
    (tmp_path / "pest").mkdir()
    with pytest.raises(VizattnError) as caught:
        ImageFolder(tmp_path / "pets", "train")
    message = str(caught.value)
    assert f"There is no folder {tmp_path / 'pets'}" in message
    assert "<class>/<image>.jpg" in message and "pest/" in message


def test_unusable_folders_show_what_is_there(tmp_path):
    with pytest.raises(VizattnError, match=r"no class folders(.|\n)*\(nothing\)"):
        ImageFolder(tmp_path, "train")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("x")
    with pytest.raises(VizattnError, match=r"no images in the class folders(.|\n)*cat/  notes.txt"):
        ImageFolder(tmp_path, "train")
    fill(tmp_path, {"dog": 1})
    with pytest.raises(VizattnError, match="no images for 'cat'"):
        ImageFolder(tmp_path, "train")


def test_split_folders_without_class_folders_are_no_classes(tmp_path):
    fill(tmp_path, {"train": 3, "val": 3})
    with pytest.raises(VizattnError, match="no class folders in 'train', 'val'"):
        ImageFolder(tmp_path, "train")


def test_a_long_tree_is_shortened(tmp_path):
    for i in range(60):
        (tmp_path / f"class{i:02}").mkdir()
    with pytest.raises(VizattnError) as caught:
        ImageFolder(tmp_path, "train")
    assert len(str(caught.value).splitlines()) < 30 and "... and 48 more" in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"val_fraction": 1.5}, {"test_fraction": -0.1}, {"val_fraction": 0.6, "test_fraction": 0.5}]
)
def test_senseless_fractions_are_refused(flat, options):
    with pytest.raises(VizattnError, match="fraction"):
        ImageFolder(flat, "train", **options)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_unreadable_images_are_left_out_and_named(split, part):
    bad = split / part / "cat" / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=re.escape(str(bad))):
        dataset = ImageFolder(split, part)
    assert dataset.skipped == {str(bad): "not an image file"} and str(bad) not in dataset.paths
    assert len(dataset) == len(dataset.labels) == {"train": 11, "val": 3, "test": 3}[part]
    with pytest.raises(VizattnError, match=re.escape(f"{bad}: not an image file")):
        ImageFolder(split, part, on_error="stop")


def test_damage_during_training_gives_another_image_of_the_class(split):
    dataset = ImageFolder(split, "train")
    (split / "train" / "dog" / "005.png").write_bytes(b"gone")
    with pytest.warns(UserWarning, match=r"stands in for .*005\.png"):
        image, label = dataset[10]
    assert label == 1 and image.getpixel((0, 0)) == (40, 0, 0)  # the first dog
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # named once
        dataset[10]


@pytest.mark.parametrize(("part", "on_error"), [("train", "stop"), ("val", "skip"), ("val", "stop")])
def test_damage_during_evaluation_or_by_option_stops(split, part, on_error):
    dataset = ImageFolder(split, part, on_error=on_error)
    path = split / part / "cat" / "000.png"
    path.write_bytes(b"gone")
    with pytest.raises(VizattnError, match=re.escape(str(path))):
        dataset[0]


def test_a_class_that_is_gone_is_an_error(split):
    dataset = ImageFolder(split, "train")
    for path in (split / "train" / "cat").iterdir():
        path.write_bytes(b"gone")
    with pytest.warns(UserWarning), pytest.raises(VizattnError, match="No image of class 'cat'"):
        dataset[0]


def test_identity_follows_names_sizes_and_times(flat):
    first = ImageFolder(flat, "train").identity
    assert first == ImageFolder(flat, "train").identity != ImageFolder(flat, "val").identity
    path = ImageFolder(flat, "train").paths[0]
    os.utime(path, (1, 1))
    assert ImageFolder(flat, "train").identity != first


def test_unknown_names_get_the_closest_match(flat):
    for call, message in (
        (lambda: build_dataset("digit", "train"), "Did you mean 'digits'"),
        (lambda: build_dataset("digits", "tarin"), "Did you mean 'train'"),
        (lambda: build_dataset("folder", "train", root=flat, val_fractoin=0.1), "Did you mean 'val_fraction'"),
        (lambda: build_dataset("folder", "train", root=flat, on_error="skipp"), "Did you mean 'skip'"),
        (lambda: build_dataset("folder", "train"), "needs its folder"),
    ):
        with pytest.raises(VizattnError, match=message):
            call()
    assert len(build_dataset("digits", "train", on_error="skip", val_fraction=0.3)) == 400


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"val_fraction": 0}, ["train", "test"]),
        ({"test_fraction": 0}, ["train", "val"]),
        ({"val_fraction": 0, "test_fraction": 0}, ["train"]),
    ],
)
def test_a_split_without_a_share_is_left_out(flat, options, expected):
    assert available_splits("folder", root=flat, **options) == expected
    assert sum(len(ImageFolder(flat, part, **options)) for part in expected) == 60


def test_a_split_that_would_be_empty_is_left_out(tmp_path):
    fill(tmp_path / "one", {"a": 1, "b": 1})
    fill(tmp_path / "two" / "train", {"a": 3, "b": 3})
    assert available_splits("folder", root=tmp_path / "one") == ["train"]
    assert available_splits("folder", root=tmp_path / "two", val_fraction=0) == ["train"]
    assert len(ImageFolder(tmp_path / "two", "train", val_fraction=0)) == 6
    with pytest.raises(VizattnError, match=r"no val split in .*; it has train"):
        ImageFolder(tmp_path / "one", "val")


def test_all_images_of_class_folders(split):
    assert has_split_folders(split) and not has_split_folders(split / "train")
    everything = ImageFolder(split / "train", "all")
    assert Counter(everything.labels) == {0: 5, 1: 6}
    with pytest.raises(VizattnError, match=r"no all split in .*; it has train, val, test"):
        ImageFolder(split, "all")
    with pytest.raises(VizattnError, match="Unknown split 'all'"):
        build_dataset("digits", "all")


def test_a_tree_with_nothing_to_train_on(tmp_path):
    fill(tmp_path / "test", {"cat": 2, "dog": 3})
    assert available_splits("folder", root=tmp_path) == ["test"]
    test = build_dataset("folder", "test", root=tmp_path)
    assert test.class_names == ["cat", "dog"] and len(test) == 5
    with pytest.raises(VizattnError, match=r"no train split in .*; it has test"):
        ImageFolder(tmp_path, "train")
    fill(tmp_path / "bird", {"nest": 1})  # so `test` is a class, with folders inside
    assert ImageFolder(tmp_path, "all").class_names == ["bird", "test"]


def test_decoding_smaller_is_another_data_set(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photo.save(tmp_path / name / "x.jpg")
    whole, small = (build_dataset("folder", "all", root=tmp_path, **options) for options in ({}, {"least_side": 30}))
    assert whole[0][0].size == (96, 64) and small[0][0].size == (48, 32)
    assert whole.identity != small.identity
    with pytest.raises(VizattnError, match="least_side must be at least 1 pixel, not 0"):
        build_dataset("folder", "all", root=tmp_path, least_side=0)
    assert available_splits("folder", root=tmp_path, least_side=30) == ["train"]


def test_names_that_are_no_text(flat):
    os.rename(flat / "cat" / "003.png", os.fsencode(flat / "cat") + b"/\xff\xfe.png")
    parts = [ImageFolder(flat, part) for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == 60 and all(part[0] is not None for part in parts)
