"""An exponential moving average of what training changes."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn

from vizattn.engine.checkpoint import changing

__all__ = ["EmaHook"]


class EmaHook(Hook):
    """Keeps ``average = decay * average + (1 - decay) * weight`` of what trains, and validates with it.

    That is each trained parameter, and each floating buffer that checkpoints hold, so that the running statistics of a
    batch norm belong to the averaged weights.

    In the first iterations the decay is lower, (1 + t) / (10 + t), so that the untrained start is soon forgotten.
    Only what trains is copied: beside a frozen backbone the average costs next to nothing, in memory and in
    checkpoints (mmengine's own hook copies the whole model).

    Args:
        model: The model that trains.
        decay: In 0..1; the average reaches back about ``1 / (1 - decay)`` iterations.
    """

    priority = "NORMAL"

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        saved = changing(model)
        self.weights: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights |= {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        decay = min(self.decay, (1 + runner.iter) / (10 + runner.iter))
        for name, weight in self.weights.items():
            self.averages[name].lerp_(weight, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the averages; a second call undoes it."""
        for name, weight in self.weights.items():
            average = self.averages[name].clone()
            self.averages[name].copy_(weight)
            weight.copy_(average)

    def before_val_epoch(self, runner: Any) -> None:
        self.swap()

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        self.swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: average.to("cpu", copy=True) for name, average in self.averages.items()}

    def restore_state(self, runner: Any, state: dict[str, Any]) -> None:
        for name, average in self.averages.items():
            average.copy_(state["ema"][name])
