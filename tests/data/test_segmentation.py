import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vizattn.data import TASK_OF, available_splits, build_dataset, build_segmentation_transforms
from vizattn.data.class_names import ADE20K, CITYSCAPES, VOC
from vizattn.data.loader import build_loader
from vizattn.data.masks import voc_palette
from vizattn.data.segmentation import SegmentationFolder
from vizattn.errors import VizattnError

SIZE = (12, 8)  # width, height


def save_mask(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    image.putpalette([value for colour in voc_palette() for value in colour])
    image.save(path)


def save_pair(image, mask, number=0, classes=3):
    """A small picture and a palette mask, whose labels go through all classes and the ignored one."""
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (number, 100, 50)).save(image)
    labels = (np.arange(SIZE[0] * SIZE[1]) + number).reshape(SIZE[::-1]) % classes
    labels[0, 0] = 255
    save_mask(mask, labels)


def fill(root, count, images="images", masks="masks", ending="", **options):
    for i in range(count):
        save_pair(root / images / f"{i:02}.jpg", root / masks / f"{i:02}{ending}.png", i, **options)
    return root


def names(dataset):
    return [os.path.splitext(os.path.basename(path))[0] for path in dataset.paths]


def voc(root, train, val, name="2007_{:06}"):
    every = [name.format(i) for i in range(train + val)]
    lists = {"train": every[:train], "val": every[train:]}
    for i, each in enumerate(every):
        save_pair(root / "JPEGImages" / f"{each}.jpg", root / "SegmentationClass" / f"{each}.png", i)
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True)
    for split, each in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(each) + "\n")
    return root


@pytest.fixture
def flat(tmp_path):
    return fill(tmp_path / "pets", 30)


def test_automatic_split_is_whole_and_fixed(flat):
    assert TASK_OF["segmentation_folder"] == "segmentation"
    assert available_splits("segmentation_folder", root=flat) == ["train", "val", "test"]
    parts = {split: build_dataset("segmentation_folder", split, root=flat) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 21, "val": 3, "test": 6}
    assert sorted(name for part in parts.values() for name in names(part)) == [f"{i:02}" for i in range(30)]
    again, other = SegmentationFolder(flat, "val"), SegmentationFolder(flat, "val", seed=1)
    assert names(again) == names(parts["val"]) != names(other)
    assert all(part.class_names == ["class 0", "class 1", "class 2"] for part in parts.values())


def test_items_are_pictures_with_index_masks(flat):
    dataset = SegmentationFolder(flat, "train")
    image, mask = dataset[0]
    number = int(names(dataset)[0])
    expected = (np.arange(96) + number).reshape(8, 12) % 3
    expected[0, 0] = 255
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == SIZE
    assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
    assert dataset.palette == voc_palette(3) and dataset.ignore_index == 255
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_batches_of_tensors(flat):
    preprocessing = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    transform = build_segmentation_transforms(preprocessing, train=True, augment="standard", crop_size=(16, 16))
    dataset = SegmentationFolder(flat, "train", transform)
    images, masks = next(iter(build_loader(dataset, 4, train=True, num_workers=1)))
    assert images.shape == (4, 3, 16, 16) and masks.shape == (4, 16, 16) and masks.dtype == torch.int64
    assert set(masks.unique().tolist()) == {0, 1, 2, 255}


@pytest.mark.parametrize(
    ("images", "masks", "ending"),
    [("{}/images", "{}/masks", ""), ("images/{}", "annotations/{}", ""), ("{}/imgs", "{}/labels", "_mask")],
)
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_above_or_below(tmp_path, images, masks, ending, val):
    for name, count in (("train", 5), (val, 2)):
        fill(tmp_path, count, images.format(name), masks.format(name), ending)
    assert available_splits("segmentation_folder", root=tmp_path) == ["train", "val"]
    assert [len(SegmentationFolder(tmp_path, split)) for split in ("train", "val")] == [5, 2]


def test_val_is_split_off_train_where_it_is_missing(tmp_path):
    fill(tmp_path, 20, "train/images", "train/masks")
    assert [len(SegmentationFolder(tmp_path, split)) for split in ("train", "val")] == [18, 2]
    with pytest.raises(VizattnError, match=r"no test split in .* it has train, val"):
        SegmentationFolder(tmp_path, "test")


def test_voc_goes_by_its_lists_and_knows_its_names(tmp_path):
    root = voc(tmp_path / "VOCdevkit" / "VOC2012", 4, 2)
    save_pair(root / "JPEGImages" / "2009_000001.jpg", root / "SegmentationClass" / "2009_000001.png")  # in no list
    train, val = (SegmentationFolder(tmp_path, split) for split in ("train", "val"))
    assert names(train) == [f"2007_00000{i}" for i in range(4)] and len(val) == 2
    assert train.class_names == VOC and train.palette == voc_palette(21)
    assert train.palette[15] == (192, 128, 128)  # person
    assert not train.skipped and available_splits("segmentation_folder", root=tmp_path) == ["train", "val"]


def test_own_data_in_vocs_layout_have_own_names(tmp_path):
    root = voc(tmp_path, 4, 2, name="photo{}")
    assert SegmentationFolder(root, "train").class_names == ["class 0", "class 1", "class 2"]
    (root / "labels.txt").write_text("ground\n cat \n\ndog\n")
    assert SegmentationFolder(root, "train").class_names == ["ground", "cat", "dog"]


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        for i in range(3):
            name = f"ADE_{split[:5]}_{i:08}"
            save_pair(tmp_path / "images" / split / f"{name}.jpg", tmp_path / "annotations" / split / f"{name}.png", i)
    plain = SegmentationFolder(tmp_path, "train")
    reduced = SegmentationFolder(tmp_path, "train", layout="ade20k", reduce_zero_label=True)
    assert plain.class_names == ["other", *ADE20K] and len(ADE20K) == len(set(ADE20K)) == 150
    assert reduced.class_names == ADE20K and (ADE20K[0], ADE20K[-1]) == ("wall", "flag")
    labels, classes = plain[1][1].astype(int), reduced[1][1]
    assert np.array_equal(classes, np.where((labels == 0) | (labels == 255), 255, labels - 1))
    assert reduced.palette == voc_palette(151)[1:]
    assert plain.identity != reduced.identity


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes(tmp_path, kind):
    for split in ("train", "val", "test"):
        for i in range(2):
            stem = f"bonn/bonn_{i:06}_000019"
            image = tmp_path / "leftImg8bit" / split / f"{stem}_leftImg8bit.png"
            mask = tmp_path / "gtFine" / split / f"{stem}_gtFine_{kind}.png"
            save_pair(image, mask, i)
            Image.new("RGBA", SIZE).save(mask.with_name(mask.name.replace(kind, "color")))
            if kind == "labelIds":
                Image.fromarray(np.tile(np.arange(12, dtype=np.uint8) + 24, (8, 1))).save(mask)
    assert available_splits("segmentation_folder", root=tmp_path) == ["train", "val"]
    dataset = SegmentationFolder(tmp_path, "val")
    assert len(dataset) == 2 and dataset.class_names == CITYSCAPES and dataset.palette[0] == (128, 64, 128)
    expected = [11, 12, 13, 14, 15, 255, 255, 16, 17, 18, 255, 255] if kind == "labelIds" else [255, 1, 2, 0]
    assert dataset[0][1][0].tolist()[: len(expected)] == expected


def test_names_may_have_indices(flat):
    (flat / "classes.txt").write_text("0: ground\n3: cat: tabby\n255: void\n")
    assert SegmentationFolder(flat, "val").class_names == ["ground", "class 1", "class 2", "cat: tabby"]
    (flat / "classes.txt").write_text("0: ground\ncat\n")
    with pytest.raises(VizattnError, match="one class name a line"):
        SegmentationFolder(flat, "val")
    (flat / "classes.txt").write_text("0: ground\n999999999: cat\n")
    with pytest.raises(VizattnError, match="names class 999999999; the largest may be"):
        SegmentationFolder(flat, "val")
    assert SegmentationFolder(flat, "val", class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]


def test_labels_out_of_range_are_named_with_what_to_set(flat):
    dataset = SegmentationFolder(flat, "train", class_names=["ground", "cat"])
    with pytest.raises(VizattnError, match=r"\.png has class 2, but there are 2 classes: 0 to 1.*classes\.txt"):
        dataset[0]


def test_two_values_for_one_object_are_explained(tmp_path):
    fill(tmp_path, 4)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.array([[0, 255] * 6] * 8, dtype=np.uint8)).save(path)
    with pytest.raises(VizattnError, match=r"labels 0, 255: fewer than two classes, as 255 is ignored"):
        SegmentationFolder(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a"], "'a' occurs twice"),
        (["a"], "two classes or more"),
        ([str(i) for i in range(256)], "at most 255"),
    ],
)
def test_names_must_make_sense(flat, names, message):
    with pytest.raises(VizattnError, match=message):
        SegmentationFolder(flat, "train", class_names=names)


def damage(root):
    """Spoils five of the pairs of images/ and masks/ in different ways."""
    (root / "masks" / "00.png").unlink()
    (root / "images" / "01.jpg").write_bytes(b"")
    whole = (root / "masks" / "02.png").read_bytes()
    (root / "masks" / "02.png").write_bytes(whole[: len(whole) // 2])
    save_mask(root / "masks" / "03.png", np.zeros((8, 11)))
    Image.new("L", SIZE).save(root / "masks" / "04.png", format="JPEG")


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_cannot_be_used_is_named_and_skipped_or_stops(tmp_path, split):
    for part in ("train", "val"):
        fill(tmp_path / part, 8)
    damage(tmp_path / split)
    with pytest.warns(UserWarning, match=f"Left out of the {split} split, 5 images") as caught:
        dataset = SegmentationFolder(tmp_path, split)
    assert names(dataset) == ["05", "06", "07"] and len(list(dataset)) == 3
    reasons = {os.path.basename(path): reason for path, reason in dataset.skipped.items()}
    assert reasons["00.jpg"] == "there is no mask for it" and reasons["01.jpg"] == "the file is empty"
    assert reasons["02.jpg"].startswith("its mask") and "02.png" in reasons["02.jpg"]
    assert reasons["03.jpg"] == "the image has 12 x 8 pixels, its mask 11 x 8"
    assert "JPEG file cannot hold labels" in reasons["04.jpg"]
    assert all(name in str(caught[0].message) for name in reasons)
    with pytest.raises(VizattnError, match=r"5 images .* cannot be used:(?s:.)*on_error=\"skip\""):
        SegmentationFolder(tmp_path, split, on_error="stop")


def test_damage_that_shows_later(flat):
    """In training another image stands in, in evaluation it is an error: each image counts there."""
    train, val = (SegmentationFolder(flat, split, class_names=["a", "b", "c"]) for split in ("train", "val"))
    for dataset in (train, val):
        with open(dataset.mask_paths[0], "wb") as file:
            file.write(b"spoilt")
    with pytest.warns(UserWarning, match="Another image stands in for"):
        image, _ = train[0]
    assert image.getpixel((0, 0)) == train[1][0].getpixel((0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train[0]  # it is told once
    with pytest.raises(VizattnError, match=r"Cannot use the image .* with the mask"):
        val[0]


@pytest.mark.parametrize(("mask_size", "turned"), [((12, 8), False), ((8, 12), True)])
def test_exif_orientation_follows_the_mask(tmp_path, mask_size, turned):
    fill(tmp_path, 4)
    stored = Image.new("RGB", SIZE, "white")
    stored.paste("black", (0, 0, 6, 8))  # black is at the left as stored, at the top when turned
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        stored.save(tmp_path / "images" / f"{i:02}.jpg", exif=exif, quality=95)
        save_mask(tmp_path / "masks" / f"{i:02}.png", np.zeros(mask_size[::-1]) + (np.arange(mask_size[0]) > 0))
    image, mask = SegmentationFolder(tmp_path, "train")[0]
    assert image.size == mask.shape[::-1] == mask_size
    left, top = np.asarray(image)[:, 0].mean(), np.asarray(image)[0].mean()
    assert (left > 100 and top < 50) if turned else (left < 50 and top > 100)


def test_an_orientation_that_keeps_the_sides_is_followed(tmp_path):
    fill(tmp_path, 4)
    stored = Image.new("RGB", SIZE, "white")
    stored.paste("black", (0, 0, 6, 8))  # at the left as stored, at the right when turned by half
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(4):
        stored.save(tmp_path / "images" / f"{i:02}.jpg", exif=exif, quality=95)
    image, _ = SegmentationFolder(tmp_path, "train")[0]
    assert np.asarray(image)[:, 0].mean() > 200 and np.asarray(image)[:, -1].mean() < 50


def test_identity_changes_with_files_and_names(flat):
    identity = SegmentationFolder(flat, "train").identity
    assert identity == SegmentationFolder(flat, "train").identity
    assert identity != SegmentationFolder(flat, "train", class_names=["a", "b", "c"]).identity
    mask = SegmentationFolder(flat, "train").mask_paths[0]
    os.utime(mask, ns=(1, 1))
    assert identity != SegmentationFolder(flat, "train").identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "vok"}, "Did you mean 'voc'"),
        ({"layout": "cityscapes"}, "no images with masks in the layout 'cityscapes'"),
        ({"on_error": "skipp"}, "Did you mean 'skip'"),
        ({"val_fraction": 1.0}, "val_fraction is a share"),
        ({"root": "/nowhere/at/all"}, "There is no folder"),
    ],
)
def test_mistakes_are_explained(flat, options, message):
    with pytest.raises(VizattnError, match=message):
        SegmentationFolder(**{"root": flat, "split": "train", **options})


def test_an_empty_folder_shows_what_is_expected(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(VizattnError, match=r"no images with masks(?s:.)*JPEGImages(?s:.)*Found in .*\n  photos/"):
        SegmentationFolder(tmp_path, "train")
    with pytest.raises(VizattnError, match=r"set data\.root"):
        build_dataset("segmentation_folder", "train")
