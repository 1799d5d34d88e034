"""Say what became of weights that were made for another number of classes, other channels, another input size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import PretrainedCfg
from torch import Tensor, nn

__all__ = ["adaptations"]


def adaptations(
    given: Mapping[str, Any], fitted: Mapping[str, Tensor], model: nn.Module, cfg: PretrainedCfg, headless: bool
) -> list[str]:
    """What differs between the weights and the model, a phrase each.

    Args:
        given: The weights as they were stored.
        fitted: The same after the family's filter: what timm is about to load.
        model: The model they go into.
        cfg: How the weights were made.
        headless: Whether only features are wanted of the model, so its classifier does not matter.
    """
    target = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    classes = getattr(model, "num_classes", cfg.num_classes)
    found = []
    for name in _names(cfg.classifier):
        old, new = fitted.get(f"{name}.weight"), target.get(f"{name}.weight")
        if headless or (old is None and new is None):
            continue
        if new is None:
            found.append(f"{name} is dropped, no classes were asked for")
        elif old is None:
            found.append(f"{name} is newly initialised for {new[0]} classes, the weights have none")
        elif classes != cfg.num_classes:  # timm goes by these numbers
            found.append(f"{name} is newly initialised for {new[0]} classes, the weights are for {len(old)}")
    for name in _names(cfg.first_conv):
        old, new = fitted.get(f"{name}.weight"), target.get(f"{name}.weight")
        if old is not None and new is not None and old.ndim == len(new) and old.shape[1] != new[1]:
            found.append(f"{name} is made for {new[1]} channels from {old.shape[1]}")
    resized = [
        f"{key} from {tuple(given[key].shape)} to {tuple(value.shape)}"
        for key, value in fitted.items()
        if isinstance(given.get(key), Tensor) and given[key].shape != value.shape
    ]
    if resized:
        found.append(f"resized: {', '.join(resized[:2])}{f' and {len(resized) - 2} more' if len(resized) > 2 else ''}")
    return found


def _names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
