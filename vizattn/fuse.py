"""Fold BatchNorm into the convolutions and linear layers beside it: fewer operations, the same function."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct, NormMlpClassifierHead
from torch import nn

from vizattn.adapters.anatomy import core
from vizattn.adapters.base import attached
from vizattn.errors import VizattnError
from vizattn.layers.conv_norm import PooledNorm, fold_after, fold_before

__all__ = ["fuse"]

Model = TypeVar("Model", bound=nn.Module)

# Exact types: a subclass may change its weight before use, as weight standardisation does, or have no fixed statistics.
CONV = (nn.Conv2d, Conv2dSame)
NORM = (nn.BatchNorm2d, nn.SyncBatchNorm, PooledNorm)


@torch.no_grad()
def fuse(model: Model) -> Model:
    """Fold every norm with running statistics that directly follows a convolution, in place; for inference only.

    Folded are: a module with a method ``fuse()`` that returns its replacement (`vizattn.layers.ConvNorm` and the like,
    timm's too), a convolution and BatchNorm next to each other in a `nn.Sequential`, timm's `ConvNormAct` (activation
    kept), and BatchNorm before a linear classifier. A model with none of these stays as it is. Parameters get other
    names where a module is replaced: load weights before.

    Args:
        model: A model in evaluation mode without adapters.

    Returns:
        The same object (or its replacement, if `model` is itself such a module).

    Raises:
        VizattnError: The model is in training mode, or has adapters attached, disabled ones too.
    """
    if getattr(core(model), "adapters_disabled", False):
        raise VizattnError("Cannot fuse a model while its adapters are disabled: leave vizattn.disabled first.")
    if attached(model):
        names = ", ".join(a.method for a in attached(model))
        raise VizattnError(f"Cannot fuse a model with adapters ({names}): call vizattn.merge or vizattn.detach first.")
    if any(m.training for m in core(model).modules()):
        raise VizattnError("Cannot fuse a model in training mode, where norms use each batch's statistics: eval() it.")
    return _fused(model)


def _fused(module: Any) -> Any:
    if callable(getattr(module, "fuse", None)):
        return module.fuse()
    for name, child in module.named_children():
        setattr(module, name, _fused(child))
    if isinstance(module, ConvNormAct):
        norm = module.bn
        if type(module.conv) in CONV and type(norm) is BatchNormAct2d and norm.running_mean is not None:
            fold_after(module.conv, norm)
            module.bn = nn.Sequential(norm.drop, norm.act)
    elif isinstance(module, NormMlpClassifierHead):
        if type(module.norm) in NORM and module.hidden_size is None and type(module.fc) is nn.Linear:
            fold_before(module.norm, module.fc)
            module.norm = nn.Identity()
    elif isinstance(module, nn.Sequential):
        _fuse_neighbours(module)
    return module


def _fuse_neighbours(module: nn.Sequential) -> None:
    for i in range(len(module) - 1):
        first: Any = module[i]
        second: Any = module[i + 1]
        if type(first) in CONV and type(second) in NORM and second.running_mean is not None:
            fold_after(first, second)
            module[i + 1] = nn.Identity()
        elif type(first) is nn.BatchNorm1d and type(second) is nn.Linear and first.running_mean is not None:
            fold_before(first, second)
            module[i] = nn.Identity()
