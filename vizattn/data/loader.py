"""Loading in batches that are a function of (seed, epoch, place in the epoch).

Neither the number of workers, nor other users of the random generator, nor an interruption changes what a model sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vizattn.errors import VizattnError

__all__ = ["EpochSampler", "build_loader", "training_batches"]


def build_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of `(images, labels)` or `(images, masks)` batches.

    Call `loader.sampler.set_epoch(epoch)` before each training epoch (the engine's `SeedHook` does). To go on
    in the middle of an epoch call `loader.sampler.skip(batches * batch_size)` after that.

    Args:
        dataset: A map-style data set; its `transform` may be random.
        batch_size: Images a batch on each rank.
        train: Shuffle, seed the transforms, and give each rank equally many images by repeating a few; see
            `training_batches` for their number. Otherwise images keep their order and each comes exactly once, so ranks
            may differ by one image.
        seed: Of the order and of random transforms.
        num_workers: Processes that load.
        rank: This process among `world_size`.
        world_size: Number of processes that share the data.
        pin_memory: For faster copies to a GPU.
    """
    if train:
        dataset = _Seeded(dataset, seed)
    sampler = EpochSampler(dataset, shuffle=train, seed=seed, rank=rank, world_size=world_size)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train and training_batches(len(sampler), batch_size) * batch_size < len(sampler),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # Every iterator draws a seed for its workers: from its own generator, not from the model's.
        generator=torch.Generator().manual_seed(seed),
    )


def training_batches(images: int, batch_size: int) -> int:
    """Batches of an epoch: a last one of a single image, which no batch norm can be trained on, is left out."""
    return max(1, images // batch_size + (images % batch_size > 1))


class EpochSampler(Sampler[int]):
    """Indices for one rank: in order, or shuffled by (seed, epoch).

    Args:
        dataset: Gives the length, and is told the epoch where it has `set_epoch`.
        shuffle: Shuffle, and repeat the first indices so that all ranks get equally many.
        seed: Of the order.
        rank: This process among `world_size`.
        world_size: Number of processes; rank r takes the indices r, r + world_size, ... of the common order.
    """

    def __init__(self, dataset: Dataset, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.dataset: Any = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Turns to the order (and, where it draws new ones, to the images) of `epoch`, from its beginning."""
        self.epoch = epoch
        self._skipped = 0
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def skip(self, samples: int) -> None:
        """Leaves out the first samples of this rank in the current epoch: those from before an interruption."""
        self._skipped = samples

    def __len__(self) -> int:
        return len(range(self.rank, self._total(), self.world_size)) - self._skipped

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.dataset)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(_hash(self.seed, self.epoch))
            order = torch.randperm(len(order), generator=generator).tolist()
        order = [order[i % len(order)] for i in range(self._total())]
        return iter(order[self.rank :: self.world_size][self._skipped :])

    def _total(self) -> int:
        length = len(self.dataset)
        return -(-length // self.world_size) * self.world_size if self.shuffle else length


class _Seeded(Dataset):
    """Fetches each batch with torch's generator seeded by (seed, epoch, first index), and puts the generator back."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset: Any = dataset
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_hash(self.seed, self.epoch, indices[0]))
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]


def _collate(items: list[Any]) -> Any:
    try:
        return default_collate(items)
    except RuntimeError:
        sizes = {tuple(image.shape[-2:]) for image, _ in items if isinstance(image, torch.Tensor)}
        if len(sizes) < 2:
            raise
        (height, width), (other_height, other_width), *_ = sorted(sizes)
        raise VizattnError(
            f"The images of a batch differ in size, as {height} x {width} and {other_height} x {other_width} pixels: "
            "set data.crop_size, or data.batch_size=1."
        ) from None


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")
