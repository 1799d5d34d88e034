"""Every option of a recipe: its default, its types and what values are allowed. Some belong to one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BY_TASK", "COMMON", "DATA_OPTIONS", "OFF_BY_DEFAULT", "REQUIRED", "TASKS", "Option", "options_of"]

REQUIRED = object()
_NONE = type(None)


@dataclass(frozen=True)
class Option:
    """One option: its default, the types it may have, and what values are allowed."""

    default: Any
    types: tuple[type, ...]
    choices: Sequence[Any] | Callable[[], Iterable[str]] | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None


def _optimizers() -> Iterable[str]:
    from timm.optim import list_optimizers

    # It needs gradients of gradients, which mmengine's step does not make.
    return [str(name) for name in list_optimizers() if name != "adahessian"]


def _datasets(task: str) -> Callable[[], Iterable[str]]:
    def names() -> Iterable[str]:
        from vizattn.data import TASK_OF

        return [name for name, own in TASK_OF.items() if own == task]

    return names


def _augmentations() -> Iterable[str]:
    from vizattn.data.transforms import AUGMENTATIONS

    return list(AUGMENTATIONS)


def _joint_augmentations() -> Iterable[str]:
    from vizattn.data.segmentation_transforms import AUGMENTATIONS

    return list(AUGMENTATIONS)


def _heads() -> Iterable[str]:
    from vizattn.heads import HEADS

    return list(HEADS)


COMMON: dict[str, Option] = {
    "model.name": Option(REQUIRED, (str,)),
    "model.pretrained": Option(True, (bool,)),
    "adapter": Option(None, (dict, list, _NONE)),
    "data.root": Option(None, (str, _NONE)),
    "data.batch_size": Option(64, (int,), least=1),
    "data.num_workers": Option(0, (int,), least=0),
    "optimizer.name": Option("adamw", (str,), _optimizers),
    "optimizer.lr": Option(1e-3, (float,), above=0.0),
    "optimizer.weight_decay": Option(1e-4, (float,), least=0.0),
    "optimizer.momentum": Option(0.9, (float,), least=0.0, most=1.0),
    "optimizer.layer_decay": Option(None, (float, _NONE), above=0.0, most=1.0),
    "optimizer.clip_grad": Option(None, (float, _NONE), above=0.0),
    "optimizer.accumulate": Option(1, (int,), least=1),
    "schedule.name": Option("cosine", (str,), ["cosine", "poly", "constant"]),
    "schedule.epochs": Option(20, (int,), least=1),
    "schedule.warmup_epochs": Option(0, (float,), least=0.0),
    "schedule.min_lr": Option(0.0, (float,), least=0.0),
    "schedule.power": Option(1.0, (float,), above=0.0),
    "ema.decay": Option(0.999, (float,), least=0.0, most=1.0),
    "amp": Option(None, (str, _NONE), [None, "bf16"]),
    "validation.interval_epochs": Option(1, (int,), least=1),
    "logging.interval": Option(10, (int,), least=1),
    "logging.wandb": Option(False, (bool,)),
    "logging.tensorboard": Option(False, (bool,)),
    "checkpoint.interval_epochs": Option(1, (int,), least=1),
    "checkpoint.interval_iters": Option(None, (int, _NONE), least=1),
    "checkpoint.keep": Option(2, (int,), least=1),
    "seed": Option(0, (int,), least=0, most=2**31 - 1),
    "deterministic": Option(False, (bool,)),
    "compile": Option(False, (bool,)),
}
"""Options of every task by their dotted names; `schedule.power` is that of the poly schedule."""

BY_TASK: dict[str, dict[str, Option]] = {
    "classification": {
        "data.name": Option("digits", (str,), _datasets("classification")),
        "data.augment": Option("none", (str,), _augmentations),
        "loss.label_smoothing": Option(0.0, (float,), least=0.0, most=0.99),
        "loss.mixup": Option(0.0, (float,), least=0.0),
        "loss.cutmix": Option(0.0, (float,), least=0.0),
        "data.resize": Option("backbone", (str,), ["backbone", "squash"]),
        "data.in_memory": Option(False, (bool,)),
        "cache_features": Option("auto", (str, bool), ["auto", False]),
        "sweep": Option(None, (dict, _NONE)),
    },
    "segmentation": {
        "head.name": Option("semantic_fpn", (str,), _heads),
        "head.auxiliary": Option(False, (bool,)),
        "data.name": Option("scenes", (str,), _datasets("segmentation")),
        "data.augment": Option("none", (str,), _joint_augmentations),
        "data.crop_size": Option(None, (int, list, _NONE)),
        "data.short_side": Option(None, (int, _NONE), least=1, most=65_536),
        "optimizer.head_lr_mult": Option(1.0, (float,), above=0.0),
        "loss.dice": Option(0.0, (float,), least=0.0),
        "loss.auxiliary": Option(0.4, (float,), least=0.0),
        "inference.mode": Option("whole", (str,), ["whole", "slide"]),
        "inference.crop_size": Option(None, (int, list, _NONE)),
        "inference.stride": Option(None, (int, list, _NONE)),
        "inference.flip": Option(False, (bool,)),
        "inference.scales": Option([1.0], (list,)),
    },
}
"""Options that one task has; the head's own (`channels` and others) are checked by the head.

`data.resize` "squash" resizes straight to the input size, by bicubic interpolation and whatever the aspect; "backbone"
is as the backbone was evaluated. `data.in_memory` keeps decoded images for the next epochs. `sweep` is for
`vizattn vtab`: options with the values to choose from.
"""

TASKS = tuple(BY_TASK)

DATA_OPTIONS: dict[str, Option] = {
    "length": Option(None, (int, _NONE), least=1),
    "seed": Option(0, (int,), least=0),
    "val_fraction": Option(0.1, (float,)),
    "test_fraction": Option(0.2, (float,)),
    "on_error": Option("skip", (str,), ["skip", "stop"]),
    "least_side": Option(None, (int, _NONE), least=1),
    "layout": Option("auto", (str,)),
    "reduce_zero_label": Option(False, (bool,)),
    "class_names": Option(None, (list, _NONE)),
    "suite": Option("vtab-mini", (str,)),
    "task_name": Option(None, (str, _NONE)),
    "stage": Option("select", (str,), ["select", "final"]),
}
"""Options of the data section that only some data sets have: checked where they are given, never filled in.

The data set checks the fractions, which are shares of the images, the layout, the suite and the task.
"""

OFF_BY_DEFAULT = ("ema",)
"""Sections that are None unless given."""


def options_of(task: str) -> dict[str, Option]:
    """Every option of a recipe for `task` by its dotted name."""
    return {"task": Option("classification", (str,), TASKS), **BY_TASK[task], **COMMON}
