"""The two baselines: train the head alone, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from vizattn.adapters.anatomy import Anatomy, classifiers
from vizattn.adapters.base import register
from vizattn.adapters.edits import Edits
from vizattn.errors import VizattnError

__all__ = ["Full", "LinearProbe"]


@register("linear_probe")
@dataclass(frozen=True)
class LinearProbe:
    """Linear probe: the classifier alone is trained, on the pooled features of the frozen backbone."""

    needs_anatomy: ClassVar[bool] = False
    mergeable: ClassVar[Literal[True]] = True
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    composes_with: ClassVar[tuple[str, ...]] = ()
    cache_level: ClassVar[Literal["pooled"]] = "pooled"
    trains_backbone: ClassVar[bool] = False

    def attach(self, model: nn.Module, anatomy: Anatomy | None, edits: Edits) -> None:
        """Nothing is added.

        Raises:
            VizattnError: the model has no head.
        """
        if not classifiers(model):
            raise VizattnError("Cannot attach 'linear_probe': the model has no head. Create it with num_classes=...")


@register("full")
@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter is trained."""

    needs_anatomy: ClassVar[bool] = False
    mergeable: ClassVar[Literal[True]] = True
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    composes_with: ClassVar[tuple[str, ...]] = ()
    cache_level: ClassVar[None] = None
    trains_backbone: ClassVar[bool] = True

    def attach(self, model: nn.Module, anatomy: Anatomy | None, edits: Edits) -> None:
        """Nothing is added."""
        for parameter in model.parameters():
            parameter.requires_grad_(True)
