import numpy as np
import pytest
import torch
from PIL import Image

from vizattn.data import build_dataset, build_transforms
from vizattn.data.glyphs import CLASS_NAMES, FACES, Glyphs, _atlas, draw
from vizattn.errors import VizattnError

PREPROCESSING = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}


def test_classes_are_the_letters():
    assert len(CLASS_NAMES) == 52 and all(name.isalpha() for name in CLASS_NAMES)
    assert build_dataset("glyphs", "test").class_names == CLASS_NAMES


def test_held_out_faces_are_not_trained_on():
    train, test = ({(face.file, face.upper) for face in FACES[split]} for split in ("train", "test"))
    assert len(train) == 23 and len(test) == 5 and not train & test
    assert FACES["val"] == FACES["train"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_face_tells_its_letters_apart(split):
    inside = (_atlas(split) > 128).reshape(len(FACES[split]), 52, -1)
    assert (inside.mean(-1) > 0.01).all()
    for face, letters in zip(FACES[split], inside):
        assert len(np.unique(letters, axis=0)) >= 51, face.name  # I and l are one in some


def test_letters_stay_inside_their_tile():
    inside = _atlas("train") > 128
    assert not inside[:, [0, -1], :].any() and not inside[:, :, [0, -1]].any()


def test_an_image_depends_on_its_index_alone():
    together = draw("train", [5, 700, 3, 9999], seed=1, epoch=2)
    assert together.dtype == torch.uint8 and together.shape == (4, 3, 32, 32)
    for i, index in enumerate([5, 700, 3, 9999]):
        assert torch.equal(together[i], draw("train", [index], seed=1, epoch=2)[0])


def test_seed_split_epoch_and_index_each_change_the_image():
    image = draw("train", [52], seed=0, epoch=0)
    others = [draw("train", [52], seed=1), draw("val", [52]), draw("train", [52], epoch=1), draw("train", [104])]
    assert all(not torch.equal(image, other) for other in others)


def test_only_the_training_split_follows_the_epoch():
    for split, moves in (("train", True), ("val", False), ("test", False)):
        dataset = Glyphs(split, length=4)
        before, identity = np.asarray(dataset[1][0]), dataset.identity
        dataset.set_epoch(1)
        assert (not np.array_equal(before, np.asarray(dataset[1][0]))) == moves
        assert (identity != dataset.identity) == moves


def test_items_with_and_without_transform():
    raw, transformed = Glyphs("val"), Glyphs("val", build_transforms(PREPROCESSING, train=False))
    image, label = raw[60]
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (32, 32) and label == 8
    tensor, label = transformed[60]
    assert tensor.shape == (3, 32, 32) and label == 8
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)
    assert [y for _, y in raw.__getitems__([0, 51, 52])] == [0, 51, 0] == [raw.labels[i] for i in (0, 51, 52)]
    with pytest.raises(IndexError):
        raw[len(raw)]


def test_images_vary_in_light_and_detail():
    images = draw("train", range(520)).float() / 255
    assert images.mean((1, 2, 3)).std() > 0.15
    assert (images.flatten(1).amax(1) - images.flatten(1).amin(1)).quantile(0.02) > 0.15  # a letter can be seen
    assert (images[:, 0] - images[:, 2]).abs().mean((1, 2)).gt(0.02).float().mean() > 0.05  # some are coloured


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_is_positive(length):
    with pytest.raises(VizattnError, match="at least 1"):
        build_dataset("glyphs", "train", length=length)
