"""FGVC: five fine-grained tasks as VPT (2203.12119) splits them, in the layout of its released lists."""

from __future__ import annotations

from vizattn.data.transfer.tasks import Suite, TransferTask

__all__ = ["FGVC"]

# Classes; images of train, val and test.
_TASKS = {
    "cub200_2011": (200, 5_394, 600, 5_794),
    "nabirds": (555, 21_536, 2_393, 24_633),
    "oxford_flowers102": (102, 1_020, 1_020, 6_149),
    "stanford_dogs": (120, 10_800, 1_200, 8_580),
    "stanford_cars": (196, 7_329, 815, 8_041),
}

FGVC = Suite(
    "fgvc",
    tuple(
        TransferTask(
            name,
            "fine-grained",
            classes,
            layout="json",
            splits={"train": (train,), "val": (val,), "trainval": (train + val,), "test": (test,)},
        )
        for name, (classes, train, val, test) in _TASKS.items()
    ),
)
