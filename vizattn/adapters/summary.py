"""How many parameters train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vizattn.adapters.anatomy import classifiers, core
from vizattn.heads import Segmenter

__all__ = ["TrainableSummary", "trainable_summary"]


@dataclass(frozen=True)
class TrainableSummary:
    """Counts of parameters."""

    with_head: int
    """Trained, the head included."""
    without_head: int
    """Trained, the head left out: what papers on adapters report."""
    total: int
    """All parameters of the model."""

    def __str__(self) -> str:
        share = self.with_head / max(self.total, 1)
        return f"trainable {self.with_head:,} of {self.total:,} ({share:.2%}), {self.without_head:,} without the head"


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count the parameters of `model`; the head is what `get_classifier()` returns, or a `Segmenter` has beside it."""
    inner = core(model)
    head = {id(p) for _, m in classifiers(inner) for p in m.parameters()}
    if isinstance(model, Segmenter):
        head |= {id(p) for p in model.parameters()} - {id(p) for p in inner.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainableSummary(
        with_head=sum(p.numel() for p in trained),
        without_head=sum(p.numel() for p in trained if id(p) not in head),
        total=sum(p.numel() for p in model.parameters()),
    )
