"""Randomness of a run as a pure function of the seed and a place in the run.

Nothing random is carried from one iteration to the next, so a resumed run draws exactly what the uninterrupted one
would have drawn. The order and the augmentation of images are done the same way in `vizattn.data.loader`.
"""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["seed_from"]


def seed_from(*key: int) -> None:
    """Seed Python, numpy and torch from a key of non-negative integers; different keys give independent streams."""
    words = np.random.SeedSequence(key).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] & 0xFFFFFFFF))
    torch.manual_seed(int(words[2]))
