"""Optimizer, accumulation and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper, PolyLR
from torch import nn

from vizattn.adapters.anatomy import core
from vizattn.errors import VizattnError
from vizattn.heads import Segmenter

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
    head_lr_mult: float = 1.0,
) -> torch.optim.Optimizer:
    """timm's optimizer of that name over the parameters that train.

    One-dimensional parameters and the model's `no_weight_decay()` get no weight decay. With `layer_decay` the learning
    rate falls by that factor from each layer to the one before it (arXiv:2106.08254). The heads of a segmenter learn
    at `head_lr_mult` times the rate.
    """
    from timm.optim import create_optimizer_v2

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise VizattnError("Nothing to train: no parameter of the model requires a gradient.")
    try:
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        if isinstance(model, Segmenter):
            groups = _groups_of_a_segmenter(model, weight_decay, layer_decay, head_lr_mult)
            optimizer = create_optimizer_v2(groups, name, **options)
        else:
            optimizer = create_optimizer_v2(model, name, layer_decay=layer_decay, **options)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise VizattnError(f"Cannot build the optimizer {name!r}: {error}") from error
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return optimizer


def _groups_of_a_segmenter(
    model: Segmenter, weight_decay: float, layer_decay: float | None, head_lr_mult: float
) -> list[dict[str, Any]]:
    """Groups of parameters of the backbone, as timm makes them for the backbone alone, and of the heads."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    backbone: Any = core(model.backbone)
    plain: Any = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    if layer_decay:
        groups = param_groups_layer_decay(backbone, weight_decay, no_weight_decay_list=plain, layer_decay=layer_decay)
    else:
        groups = param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=plain)
    for name, part in model.named_children():
        if name != "backbone":
            groups += [group | {"lr_scale": head_lr_mult} for group in param_groups_weight_decay(part, weight_decay)]
    return [group for group in groups if group["params"]]


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: int,
    length: int,
    power: float = 1.0,
) -> list[Any]:
    """Linear warm-up, then a fall to `min_lr` (or no change), stepped each iteration; `length` make an epoch.

    The fall is a cosine, or ``(1 - t) ** power`` ("poly"). By a cosine each group falls to the same share of its own
    rate, `min_lr / lr`.
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
    if name == "poly":
        schedule.append(PolyLR(optimizer, power=power, eta_min=min_lr, begin=warm, end=total, by_epoch=False))
    return schedule
