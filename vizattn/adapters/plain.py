"""The two baselines: train the head alone, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from vizattn.adapters.anatomy import Anatomy
from vizattn.adapters.base import register
from vizattn.adapters.edits import Edits

__all__ = ["Full", "LinearProbe"]


@register("linear_probe")
@dataclass(frozen=True)
class LinearProbe:
    """Linear probe: the head alone is trained, on the features of the frozen backbone."""

    needs_anatomy: ClassVar[bool] = False
    mergeable: ClassVar[Literal[True]] = True
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    composes_with: ClassVar[tuple[str, ...]] = ()
    cache_level: ClassVar[Literal["pooled"]] = "pooled"
    trains_backbone: ClassVar[bool] = False

    def attach(self, model: nn.Module, anatomy: Anatomy | None, edits: Edits) -> None:
        """Nothing is added; of a `features_only` model nothing trains but the head that will read its maps."""


@register("full")
@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter is trained."""

    needs_anatomy: ClassVar[bool] = False
    mergeable: ClassVar[Literal[True]] = True
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    composes_with: ClassVar[tuple[str, ...]] = ()
    cache_level: ClassVar[None] = None
    trains_backbone: ClassVar[bool] = True

    def attach(self, model: nn.Module, anatomy: Anatomy | None, edits: Edits) -> None:
        """Nothing is added."""
        for parameter in model.parameters():
            parameter.requires_grad_(True)
