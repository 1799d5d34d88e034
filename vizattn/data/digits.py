"""scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels (Alpaydin and Kaynak, UCI, 1998)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

__all__ = ["Digits", "split_indices"]

_PER_CLASS = {"train": 40, "val": 10}  # 400 and 100 images; the other 1,297 are the test split


class Digits(Dataset):
    """One split of the digits: PIL RGB images of 8x8 pixels, grey 0..16 scaled to 0..255, through `transform`."""

    def __init__(self, split: str, transform: Callable[[Any], Any] | None = None) -> None:
        scans, targets = _load()
        chosen = split_indices(targets)[split]
        self.split = split
        self.class_names = [str(digit) for digit in range(10)]
        self.transform = transform
        self.scans = scans[chosen]
        self.labels: list[int] = targets[chosen].tolist()
        self.identity = hashlib.sha256(b"digits" + self.scans.tobytes() + repr(self.labels).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.scans[index]).convert("RGB")
        return image if self.transform is None else self.transform(image), self.labels[index]


def split_indices(targets: np.ndarray) -> dict[str, np.ndarray]:
    """The fixed split. In each class, in the order of SHA-256 of "digits/<index>", the first 40 scans are the training
    split, the next 10 the validation split, the rest the test split; indices ascend within a split."""
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        members = np.flatnonzero(targets == digit).tolist()
        members.sort(key=lambda index: hashlib.sha256(f"digits/{index}".encode()).digest())
        first, second = _PER_CLASS["train"], _PER_CLASS["train"] + _PER_CLASS["val"]
        parts["train"] += members[:first]
        parts["val"] += members[first:second]
        parts["test"] += members[second:]
    return {split: np.sort(np.array(indices)) for split, indices in parts.items()}


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import

    scans, targets = load_digits(return_X_y=True)
    return np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), targets
