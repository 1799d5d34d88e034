"""Optimizer, accumulation and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch import nn

from vizattn.errors import VizattnError

__all__ = ["EpochOptimWrapper", "build_optimizer", "build_schedule"]


class EpochOptimWrapper(OptimWrapper):
    """Accumulation that starts anew each epoch: the last step of an epoch takes what is left.

    So no gradient is ever pending at an epoch's end, and a checkpoint there holds everything.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accumulate: int, clip_grad: float | None, length: int) -> None:
        super().__init__(optimizer, accumulate, {"max_norm": clip_grad} if clip_grad else None)
        self.length = length

    def steps_after(self, iteration: int) -> bool:
        """Whether the optimizer steps at the end of the iteration with this number (from 0)."""
        place = iteration % self.length + 1
        return place % self._accumulative_counts == 0 or place == self.length

    def should_update(self) -> bool:
        return self.steps_after(self._inner_count - 1)  # backward has counted this iteration already

    def should_sync(self) -> bool:
        return self.steps_after(self._inner_count)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        first = self._inner_count % self.length // self._accumulative_counts * self._accumulative_counts
        return loss / min(self._accumulative_counts, self.length - first)

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        self._inner_count, self._max_counts = init_counts, max_counts


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    layer_decay: float | None,
) -> torch.optim.Optimizer:
    """timm's optimizer of that name over the parameters that train.

    One-dimensional parameters and the model's `no_weight_decay()` get no weight decay. With `layer_decay` the learning
    rate falls by that factor from each layer to the one before it (arXiv:2106.08254).
    """
    from timm.optim import create_optimizer_v2

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise VizattnError("Nothing to train: no parameter of the model requires a gradient.")
    try:
        optimizer = create_optimizer_v2(
            model, name, lr=lr, weight_decay=weight_decay, momentum=momentum, layer_decay=layer_decay
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise VizattnError(f"Cannot build the optimizer {name!r}: {error}") from error
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: int,
    length: int,
) -> list[Any]:
    """Linear warm-up, then a cosine down to `min_lr` (or no change), stepped each iteration; `length` make an epoch.

    With layer decay each group falls to the same share of its own rate, `min_lr / lr`.
    """
    total, warm = epochs * length, math.floor(warmup_epochs * length)
    schedule: list[Any] = []
    if warm:
        schedule.append(LinearLR(optimizer, start_factor=1 / (warm + 1), begin=0, end=warm, by_epoch=False))
    if name == "cosine":
        ratio = min(min_lr / lr, 1.0)
        schedule.append(
            CosineAnnealingLR(optimizer, T_max=total - warm, eta_min_ratio=ratio, begin=warm, end=total, by_epoch=False)
        )
    return schedule
