import pytest
import torch
from torch.utils.data import Subset

from vizattn.data import build_dataset, build_transforms
from vizattn.data.loader import EpochSampler, build_loader, training_batches

PREPROCESSING = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def digits():
    dataset = build_dataset("digits", "val", transform=build_transforms(PREPROCESSING, True, "light"))
    assert len(dataset) == 100
    return dataset


def batches(dataset, epoch=1, skip=0, **options):
    loader = build_loader(dataset, 16, **{"train": True, "seed": 3, **options})
    loader.sampler.set_epoch(epoch)
    loader.sampler.skip(skip)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(a, b))


def test_an_epoch_is_a_function_of_seed_and_epoch(digits):
    first = batches(digits)
    torch.rand(100)  # others draw from the global generator
    assert same(first, batches(digits))
    assert not same(first, batches(digits, epoch=2)) and not same(first, batches(digits, seed=4))


def test_workers_change_nothing(digits):
    assert same(batches(digits), batches(digits, num_workers=2))


def test_an_interrupted_epoch_goes_on(digits):
    assert same(batches(digits)[3:], batches(digits, skip=3 * 16))


def test_loading_leaves_the_global_generator_alone(digits):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(digits)
    assert torch.equal(torch.rand(3), expected)


def test_new_letters_are_drawn_each_epoch_also_by_workers():
    dataset = build_dataset("glyphs", "train", transform=build_transforms(PREPROCESSING, True), length=32)
    first, second = batches(dataset, epoch=0), batches(dataset, epoch=1, num_workers=1)
    drawn = [torch.cat([x for x, _ in epoch]) for epoch in (first, second)]
    assert not any(torch.equal(image, other) for image in drawn[0] for other in drawn[1])
    assert same(second, batches(dataset, epoch=1))


def test_ranks_share_an_epoch(digits):
    shares = [list(EpochSampler(digits, shuffle=True, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [34, 34, 34]
    assert set().union(*shares) == set(range(100))
    shares = [list(EpochSampler(digits, shuffle=False, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(100))


def test_evaluation_keeps_order_and_each_image_once():
    dataset = build_dataset("digits", "val", transform=build_transforms(PREPROCESSING, train=False))
    found = batches(dataset, train=False)
    assert torch.cat([y for _, y in found]).tolist() == dataset.labels
    assert torch.equal(torch.cat([x for x, _ in found]), torch.stack([x for x, _ in dataset]))


def test_a_last_batch_of_one_image_is_left_out_of_training(digits):
    nine = Subset(digits, range(9))
    assert [len(labels) for _, labels in build_loader(nine, 4, train=True)] == [4, 4]
    assert [len(labels) for _, labels in build_loader(nine, 4, train=False)] == [4, 4, 1]
    assert len(build_loader(nine, 5, train=True)) == training_batches(9, 5) == 2
    assert [training_batches(9, size) for size in (1, 4, 9, 16)] == [9, 2, 1, 1]
    assert training_batches(1, 4) == 1
