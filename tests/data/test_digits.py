from collections import Counter

import numpy as np
from sklearn.datasets import load_digits

from vizattn.data import SPLITS, build_dataset
from vizattn.data.digits import split_indices

FIRST = {"train": [0, 1, 2, 4, 5, 8], "val": [11, 24, 25, 43, 76, 124], "test": [3, 6, 7, 9, 12, 13]}


def test_split_is_disjoint_whole_and_stratified():
    targets = load_digits().target
    parts = split_indices(targets)
    assert {split: len(part) for split, part in parts.items()} == {"train": 400, "val": 100, "test": 1297}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    assert set(Counter(targets[parts["train"]].tolist()).values()) == {40}
    assert set(Counter(targets[parts["val"]].tolist()).values()) == {10}


def test_split_never_moves():
    parts = split_indices(load_digits().target)
    assert {split: part[:6].tolist() for split, part in parts.items()} == FIRST


def test_items_are_the_scans():
    scans = load_digits()
    first = split_indices(scans.target)["train"][0]
    dataset = build_dataset("digits", "train")
    image, label = dataset[0]
    assert image.mode == "RGB" and image.size == (8, 8)
    assert label == scans.target[first] == dataset.labels[0]
    np.testing.assert_allclose(np.asarray(image)[..., 0] / 255 * 16, scans.images[first], atol=0.04)
    assert dataset.class_names == [str(digit) for digit in range(10)]


def test_identity_is_the_content():
    identities = [build_dataset("digits", split).identity for split in SPLITS]
    assert len(set(identities)) == 3
    assert identities == [build_dataset("digits", split).identity for split in SPLITS]
