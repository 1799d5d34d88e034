"""Images decoded and resized once, and kept as bytes: each epoch only normalises them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from vizattn.data import is_deterministic, transform_identity

__all__ = ["decoded"]

_KEPT = 3  # data sets: what a transfer task trains and selects on
_stores: OrderedDict[tuple[str, str], list[torch.Tensor | None]] = OrderedDict()


def decoded(dataset: Any) -> Dataset:
    """`dataset`, with each image decoded at its first use only; as it is where its transform is random.

    Data sets that are equal share what they keep, in this process.
    """
    transform = dataset.transform
    if not isinstance(transform, v2.Compose) or not is_deterministic(transform) or hasattr(dataset, "set_epoch"):
        return dataset
    steps = transform.transforms
    bytes_end = next((i for i, step in enumerate(steps) if isinstance(step, v2.ToDtype)), None)
    if bytes_end is None:
        return dataset
    key = (dataset.identity, transform_identity(transform))
    store = _stores.setdefault(key, [None] * len(dataset))
    _stores.move_to_end(key)
    while len(_stores) > _KEPT:
        _stores.popitem(last=False)
    dataset.transform = v2.Compose(steps[:bytes_end])
    return _Decoded(dataset, transform, v2.Compose(steps[bytes_end:]), store)


class _Decoded(Dataset):
    def __init__(
        self, dataset: Any, transform: v2.Compose, after: v2.Compose, store: list[torch.Tensor | None]
    ) -> None:
        self.dataset, self.transform, self.after, self.store = dataset, transform, after, store
        self.class_names, self.identity, self.labels = dataset.class_names, dataset.identity, dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.store[index]
        if image is None:
            image = self.store[index] = self.dataset[index][0]
        return self.after(image), self.labels[index]
