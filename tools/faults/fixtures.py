"""Makes what the cases damage, small and from fixed seeds: ``python -m faults.fixtures FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CLASSES = ("left", "middle", "right")
RELEASE = "efficientvit_va_m0.in1k"
"""Weights that the fixtures pretend to publish: small, and of no hash that vizattn knows."""


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """4 epochs of 5 iterations, a checkpoint every 3 of them."""
    return {
        "model": {"name": "vit_va_nano_patch4_32", "pretrained": True},
        "adapter": {"method": "vpt", "num_tokens": 2},
        "data": {"name": "folder", "root": str(root / "pictures"), "batch_size": 6, "augment": "light"},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "checkpoint": {"interval_iters": 3},
        **changes,
    }


def make_pictures(root: Path) -> None:
    """Three classes, a bright third of the image; and pairs of images and masks."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4), ("test", 5)):
        for label, name in enumerate(CLASSES):
            folder = root / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[:, 11 * label : 11 * label + 10] += 100
                Image.fromarray(pixels).save(folder / f"{number}.png")
        for number in range(count):
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            mask = np.zeros((32, 32), dtype=np.uint8)
            for label in (1, 2):
                y, x = rng.integers(0, 20, 2)
                pixels[y : y + 12, x : x + 12, label] += 100
                mask[y : y + 12, x : x + 12] = label
            for kind, picture in (("images", pixels), ("masks", mask)):
                folder = root / "pairs" / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(folder / f"{number}.png")
    (root / "pairs" / "classes.txt").write_text("ground\ngreen\nblue\n")


def make_suite(root: Path) -> None:
    """Two tasks in the layout of lists."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(1)
    parts = {"train800": 24, "val200": 12, "test": 30}
    for task in ("near", "far"):
        lists: dict[str, list[str]] = {}
        for part, count in parts.items():
            for number in range(count):
                label = number % 3
                pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[:, 5 * label : 5 * label + 5] += 60
                for where in (part, *(["train800val200"] if part != "test" else [])):
                    name = f"images/{where}/{part}-{number}.png"
                    path = root / "tasks" / task / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
                    lists.setdefault(where, []).append(f"{name} {label}")
        for where, lines in lists.items():
            (root / "tasks" / task / f"{where}.txt").write_text("\n".join(lines) + "\n")
    tasks = [{"name": name, "group": f"{name}-group", "num_classes": 3, "layout": "lists"} for name in ("near", "far")]
    (root / "tasks" / "tiny.json").write_text(json.dumps({"name": "tiny", "tasks": tasks}))


def make_models(root: Path) -> None:
    """Runs with an adapter, of two seeds; one without; one of a segmenter; and a released file."""
    import timm
    import torch
    from timm.models import get_pretrained_cfg

    from vizattn.engine import train
    from vizattn.weights.convert import released, save_released

    (root / "recipe.json").write_text(json.dumps(recipe(root)))
    for seed in (0, 1):
        train(recipe(root, seed=seed), work_dir=root / f"run{seed}", quiet=True, report=False)
    tiny = {"pretrained": False, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    whole = {"model": {"name": "vit_va_nano_patch4_32", **tiny}, "adapter": None}
    (root / "whole.json").write_text(json.dumps(recipe(root, **whole)))
    train(recipe(root, **whole), work_dir=root / "whole", quiet=True, report=False)
    pairs = {
        "task": "segmentation",
        "adapter": {"method": "linear_probe"},
        "head": {"name": "linear"},
        "data": {"name": "segmentation_folder", "root": str(root / "pairs"), "batch_size": 5},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
    }
    (root / "pairs.json").write_text(json.dumps(recipe(root, **pairs)))
    train(recipe(root, **pairs), work_dir=root / "segmenter", quiet=True, report=False)
    torch.manual_seed(0)
    model = timm.create_model(RELEASE.partition(".")[0], pretrained=False)
    cfg = get_pretrained_cfg(RELEASE)
    assert cfg is not None
    save_released(released(dict(model.state_dict()), cfg), root / "published" / f"{RELEASE}.pth")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    make_pictures(place)
    make_suite(place)
    make_models(place)
