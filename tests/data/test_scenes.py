import numpy as np
import pytest
import torch
from PIL import Image

from vizattn.data import available_splits, build_dataset
from vizattn.data.loader import build_loader
from vizattn.data.scenes import CLASS_NAMES, PALETTE, Scenes, _outlines, draw_scenes
from vizattn.data.segmentation_transforms import build_segmentation_transforms
from vizattn.errors import VizattnError

PREPROCESSING = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def drawn():
    return draw_scenes("train", range(400))


def test_items_are_pictures_with_masks():
    dataset = build_dataset("scenes", "val")
    image, mask = dataset[3]
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (64, 64)
    assert mask.dtype == np.uint8 and mask.shape == (64, 64)
    assert len(dataset.class_names) == len(dataset.palette) == len(set(PALETTE)) == 8
    assert available_splits("scenes") == ["train", "val", "test"]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_scene_depends_on_its_index_alone():
    images, masks = draw_scenes("train", [5, 700, 3, 9999], seed=1, epoch=2)
    for i, index in enumerate([5, 700, 3, 9999]):
        image, mask = draw_scenes("train", [index], seed=1, epoch=2)
        assert np.array_equal(image[0], images[i]) and np.array_equal(mask[0], masks[i])


def test_seed_split_epoch_and_index_each_change_the_scene():
    image, mask = draw_scenes("train", [52])
    others = [draw_scenes("train", [52], seed=1), draw_scenes("val", [52]), draw_scenes("train", [52], epoch=1)]
    for other, other_mask in [*others, draw_scenes("train", [53])]:
        assert not np.array_equal(image, other) and not np.array_equal(mask, other_mask)


def test_only_the_training_split_follows_the_epoch():
    for split, moves in (("train", True), ("val", False), ("test", False)):
        dataset = Scenes(split, length=4)
        before, identity = dataset[1][1], dataset.identity
        dataset.set_epoch(1)
        assert (not np.array_equal(before, dataset[1][1])) == moves
        assert (identity != dataset.identity) == moves


def test_every_class_is_common_and_small_enough(drawn):
    _, masks = drawn
    seen = np.array([[(mask == label).sum() >= 12 for label in range(len(CLASS_NAMES))] for mask in masks])
    assert seen[:, 0].all() and (seen[:, 1:].mean(0) > 0.2).all() and (seen[:, 1:].mean(0) < 0.5).all()
    assert 0.6 < (masks == 0).mean() < 0.85


def test_masks_are_exact(drawn):
    """Across a border the picture changes, and a shifted mask fits it worse."""
    images, masks = drawn
    tone = images.astype(float).mean(-1)

    def contrast(mask):
        edge = mask[:, :, 1:] != mask[:, :, :-1]
        return np.abs(tone[:, :, 1:] - tone[:, :, :-1])[edge].mean()

    fits = {shift: contrast(np.roll(masks, shift, axis=2)) for shift in (-2, -1, 0, 1, 2)}
    assert max(fits, key=fits.get) == 0


def test_colour_and_texture_do_not_tell_the_class(drawn):
    images, masks = drawn
    tones = [images[masks == label].astype(float) for label in range(1, len(CLASS_NAMES))]
    means = np.array([tone.mean(0) for tone in tones])
    assert (means.max(0) - means.min(0) < 45).all()  # of 255, where one object's tone strays by 60 and more
    assert (np.array([tone.std(0) for tone in tones]) > 60).all()


def test_objects_cover_one_another_and_the_shapes_differ():
    outlines = _outlines("train")[:, 0] > 0
    assert not outlines[:, [0, -1]].any() and not outlines[:, :, [0, -1]].any()
    assert len({outline.tobytes() for outline in outlines}) == len(outlines)
    assert len(_outlines("test")) != len(outlines)
    hole = outlines[1, 32, 32], outlines[0, 32, 32]
    assert hole == (False, True)


def test_a_loader_gives_tensors_of_both():
    transform = build_segmentation_transforms(PREPROCESSING, train=True, augment="light", crop_size=(48, 48))
    dataset = build_dataset("scenes", "train", transform=transform, length=32)
    here, there = (list(build_loader(dataset, 16, train=True, num_workers=workers)) for workers in (0, 1))
    for images, masks in here:
        assert images.shape == (16, 3, 48, 48) and masks.shape == (16, 48, 48)
        assert images.dtype == torch.float32 and masks.dtype == torch.int64
    assert all(torch.equal(a, b) for batch, other in zip(here, there, strict=True) for a, b in zip(batch, other))


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_is_positive(length):
    with pytest.raises(VizattnError, match="at least 1"):
        build_dataset("scenes", "train", length=length)
