"""A tiny model and a tiny folder of images: whole runs in about a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

TINY = {
    "name": "vit_va_nano_patch4_32",
    "pretrained": False,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Runs are compared bit for bit with runs in other processes.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes (a bright third of the image) of 10 train, 4 val and 5 test images, 32x32."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4), ("test", 5)):
        for label, name in enumerate(("left", "middle", "right")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[:, 11 * label : 11 * label + 10] += 100
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def recipe(image_folder: Path) -> dict[str, Any]:
    """5 iterations an epoch of 6 images, 4 epochs."""
    return {
        "model": dict(TINY),
        "data": {"name": "folder", "root": str(image_folder), "batch_size": 6},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "logging": {"interval": 2},
    }


@pytest.fixture
def adapter_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same with the pretrained model, as adapters need it."""
    return {**recipe, "model": {"name": "vit_va_nano_patch4_32", "pretrained": True}}
