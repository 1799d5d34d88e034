"""VTAB-mini: counts, labels, splits that are apart, and images that never change."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from vizattn.data import build_dataset
from vizattn.data.transfer import available, balls, dsprites, get_suite, mini, open_split, photos, terrain
from vizattn.errors import VizattnError

SUITE = get_suite("vtab-mini")
TASKS = [task.name for task in SUITE.tasks]


def test_the_groups_are_those_of_vtab():
    groups = {group: [task.name for task in SUITE.tasks if task.group == group] for group in SUITE.groups}
    assert groups == {
        "natural": ["digits", "photo_crops", "fonts"],
        "specialized": ["terrain"],
        "structured": ["dsprites_loc", "dsprites_ori", "count", "distance"],
    }
    assert all(available(SUITE, task) for task in SUITE.tasks)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_images_and_labels(name):
    task = SUITE.task(name)
    parts = {split: open_split(SUITE, name, split) for split in ("train", "val", "trainval", "test")}
    assert {split: (len(part),) for split, part in parts.items()} == task.splits
    for part in parts.values():
        assert len(part.class_names) == task.num_classes
        assert set(part.labels) == set(range(task.num_classes))
    assert parts["trainval"].labels == parts["train"].labels + parts["val"].labels
    image, label = parts["val"][-1]
    assert image.mode == "RGB" and image.size in {(8, 8), (24, 24), (32, 32), (64, 64)}
    assert label == parts["trainval"][999][1] and parts["val"].digest(199) == parts["trainval"].digest(999)
    images = {split: {part.digest(i) for i in range(len(part))} for split, part in parts.items()}
    assert images["trainval"] == images["train"] | images["val"]
    if name not in ("terrain", "photo_crops"):  # crops of few places may coincide, within a split
        assert len(images["test"]) == len(parts["test"])
    assert not images["train"] & images["val"] and not images["trainval"] & images["test"]
    assert len({part.identity for part in parts.values()}) == 4


def test_classes_are_about_as_frequent_as_each_other():
    for task in SUITE.tasks:
        counts = Counter(open_split(SUITE, task, "test").labels)
        assert min(counts.values()) > 0.5 * 1000 / task.num_classes or task.name == "digits", task.name


def pinned(task, split):
    images, labels = mini.images_of(task, split)
    return hashlib.sha256(images.tobytes() + bytes(labels)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("task", "train", "test"),
    [
        ("digits", "50be12edfa9d097d", "4c751bc0a75f900c"),
        ("dsprites_loc", "1c0c5289efef5c06", "1937252e3f4e2b3c"),
        ("dsprites_ori", "885b80e360ed1100", "509a799f3692d691"),
        ("terrain", "23b4542aa7d7ab45", "ecc4608e0fd90a95"),
        ("photo_crops", "162d6133dcba98a2", "e16d9235aad136cc"),
    ],
)
def test_images_that_integers_make_are_pinned(task, train, test):
    assert (pinned(task, "train"), pinned(task, "test")) == (train, test)


@pytest.mark.parametrize(("task", "brightness"), [("fonts", 97.76), ("count", 135.22), ("distance", 138.11)])
def test_images_that_are_rendered_are_pinned_but_for_rounding(task, brightness):
    images, _ = mini.images_of(task, "val")
    assert images.mean() == pytest.approx(brightness, abs=0.01)


@pytest.mark.parametrize("name", TASKS)
def test_images_are_the_same_when_made_again(name):
    first, again = mini.images_of(name, "val"), mini.images_of.__wrapped__(name, "val")
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]


def test_only_the_split_that_is_looked_at_is_made(monkeypatch):
    asked = []

    def watch(task, split):
        asked.append(split)
        return mini.images_of(task, split)

    monkeypatch.setattr("vizattn.data.transfer.datasets.images_of", watch)
    parts = {split: open_split(SUITE, "digits", split) for split in ("train", "val", "trainval", "test")}
    assert not asked
    for split in ("train", "val", "trainval"):
        assert parts[split][0] and parts[split].identity and parts[split].labels and parts[split].digest(0)
    assert set(asked) == {"train", "val"}


@pytest.mark.parametrize("shape", [(344, 403), (427, 640), (64, 64)])
def test_splits_share_no_part_of_a_picture(shape):
    used = np.zeros(shape, dtype=int)
    for split in ("train", "val", "test"):
        for top, left in photos.cells_of("key", shape, 28, split):
            used[top : top + 28, left : left + 28] += 1
    assert used.max() == 1 and used[: shape[0] // 28 * 28, : shape[1] // 28 * 28].min() == 1


def test_crops_lie_in_a_cell_of_their_split(monkeypatch):
    """In a picture whose pixels say which cell they are in."""
    cell = 72
    rows, columns = np.indices((432, 576)) // cell
    picture = np.repeat((rows * 8 + columns)[..., None], 3, -1).astype(np.uint8)
    monkeypatch.setattr(photos, "_picture", lambda name: picture)
    cells = {}
    for split in ("train", "val", "test"):
        images, _ = photos.crops("task", ["a"], split, 300, cell=cell)
        assert all(len(np.unique(image)) == 1 for image in images)
        cells[split] = {int(image[0, 0, 0]) for image in images}
    assert sum(map(len, cells.values())) == len(set.union(*cells.values())) > 40


def test_labels_of_terrain_are_its_slope():
    images, labels = terrain.terrain("test", 1000)
    contrast = images.reshape(1000, -1).std(1)
    means = [contrast[np.array(labels) == grade].mean() for grade in range(5)]
    assert means == sorted(means)


def test_sprites_are_those_of_the_definition():
    assert dsprites.COUNT == 3 * 6 * 40 * 32 * 32
    order = dsprites.shuffled()
    assert np.array_equal(np.sort(order), np.arange(dsprites.COUNT))
    assert not np.array_equal(order[:100], dsprites.shuffled(1)[:100])
    images = dsprites.draw_sprites(order[:1000])
    assert images.shape == (1000, 64, 64) and set(np.unique(images)) == {0, 255}
    frame = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    assert not frame.any()  # no shape is cut off
    shape, scale, _, x, y = dsprites.factors(order[:1000])
    area = (images > 0).sum((1, 2))
    size = np.linspace(0.5, 1, 6)[scale]
    for kind, expected in enumerate((22.0**2, np.pi * 15.5 * 10)):  # square, ellipse
        assert area[shape == kind] / size[shape == kind] ** 2 == pytest.approx(expected, rel=0.1)
    columns = (images.sum(1) * (np.arange(64) + 0.5)).sum(1) / images.sum((1, 2))
    rows = (images.sum(2) * (np.arange(64) + 0.5)).sum(1) / images.sum((1, 2))
    symmetric = shape < 2
    assert columns[symmetric] == pytest.approx((16 + 32 * x / 31)[symmetric], abs=0.6)
    assert rows[symmetric] == pytest.approx((16 + 32 * y / 31)[symmetric], abs=0.6)


def test_sprites_turn_by_the_orientation():
    def sprite(shape, orientation):
        index = np.ravel_multi_index((shape, 5, orientation, 16, 16), (3, 6, 40, 32, 32))
        return dsprites.draw_sprites(np.array([index]))[0]

    for shape in range(3):
        assert np.array_equal(sprite(shape, 0), sprite(shape, 39))  # 0 and a full turn
        assert not np.array_equal(sprite(shape, 0), sprite(shape, 5))
    heart = sprite(2, 0)
    assert (
        np.array_equal(heart[:, 1:], heart[:, :0:-1])
        or abs(int(heart[:, :32].sum()) - int(heart[:, 32:].sum())) < 20000
    )


def test_labels_of_sprites_are_bins_of_their_factor():
    index = np.ravel_multi_index(np.array([[0], [0], [0], [0], [0]]), (3, 6, 40, 32, 32))
    assert dsprites.label_sprites("dsprites_loc", index) == dsprites.label_sprites("dsprites_ori", index) == [0]
    every = dsprites.shuffled()
    for task, factor, per_bin in (("dsprites_loc", 3, 2), ("dsprites_ori", 2, 2.5)):
        values = dsprites.factors(every)[factor]
        assert np.array_equal(dsprites.label_sprites(task, every), np.floor(values / per_bin))


def test_balls_are_counted_and_measured():
    images, numbers, nearest = balls.draw_balls("key", 100)
    assert images.shape == (100, 64, 64, 3) and set(numbers) == set(range(3, 11))
    # The plane is grey: the nearer the balls, the more colour.
    coloured = (np.ptp(images.astype(int), axis=-1) > 60).sum((1, 2))
    assert coloured.min() > 0
    assert np.corrcoef(coloured, -nearest)[0, 1] > 0.5
    again, *_ = balls.draw_balls("key", 30)
    assert np.array_equal(again, images[:30])  # each scene depends on its number alone


def test_pictures_of_a_package_that_is_not_there_are_missing_with_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "file_of", lambda name: tmp_path / name)
    reason = available("vtab-mini-skimage", "textures").reason
    assert "brick.png" in reason and "pip install scikit-image" in reason
    with pytest.raises(VizattnError, match="pip install scikit-image"):
        open_split("vtab-mini-skimage", "textures", "train")
    assert "pip install matplotlib" in available("vtab-mini", "terrain").reason
    assert available("vtab-mini", "count")


def test_as_the_data_set_of_a_recipe():
    train, val = (build_dataset("transfer", split, task_name="digits") for split in ("train", "val"))
    assert (len(train), len(val)) == (800, 200)
    assert len(build_dataset("transfer", "test", task_name="digits", stage="final")) == 797
