"""A tiny suite: two tasks in the community's layout, 24 + 12 + 30 images of three classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vizattn.data.transfer import get_suite
from vizattn.engine.vtab.plan import Method, Study

SIZES = {"train": 24, "val": 12, "test": 30}
NANO = {"name": "vit_va_nano_patch4_32", "pretrained": True}
RECIPE = {
    "model": dict(NANO),
    "data": {"batch_size": 8},
    "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 1e-4},
    "schedule": {"epochs": 2, "warmup_epochs": 1},
}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tasks `near` and `far`, and the suite `tiny.json`."""
    root = tmp_path_factory.mktemp("vtab")
    rng = np.random.default_rng(0)
    for task in ("near", "far"):
        lists: dict[str, list[str]] = {}
        number = 0
        for split, size in SIZES.items():
            folder = {"train": "train800", "val": "val200", "test": "test"}[split]
            for place in range(size):
                label = place % 3
                pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[:, 5 * label : 5 * label + 5] += 60
                image = Image.fromarray(pixels)
                name = f"{number:06d}.png"
                number += 1
                for part in (folder, *(["train800val200"] if split != "test" else [])):
                    path = root / task / "images" / part / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
                    lists.setdefault(part, []).append(f"images/{part}/{name} {label}")
        for part, lines in lists.items():
            (root / task / f"{part}.txt").write_text("\n".join(lines) + "\n")
    tasks = [
        {"name": name, "group": name[0] + "-group", "num_classes": 3, "layout": "lists"} for name in ("near", "far")
    ]
    (root / "tiny.json").write_text(json.dumps({"name": "tiny", "tasks": tasks}))
    return root


@pytest.fixture
def method() -> Callable[..., Method]:
    """A method of the tiny recipe; `adapter` as in a recipe, `grid` the settings."""

    def make(label: str = "linear_probe", grid: list[dict[str, Any]] | None = None, **changes: Any) -> Method:
        recipe = json.loads(json.dumps(RECIPE)) | {"adapter": {"method": label}} | changes
        return Method(label, recipe, grid or [{}])

    return make


@pytest.fixture
def study(tree: Path) -> Callable[..., Study]:
    """A study of these methods on the tiny suite, two seeds."""

    def make(*methods: Method, **changes: Any) -> Study:
        suite = get_suite(tree / "tiny.json")
        values: dict[str, Any] = {
            "suite": str(tree / "tiny.json"),
            "root": str(tree),
            "tasks": [*suite.tasks],
            "methods": [*methods],
            "seeds": [1, 2],
            "sweep_seeds": [1],
            "device": "cpu",
        }
        return Study(**(values | changes))

    return make
