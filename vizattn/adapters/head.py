"""A classifier of another width, for adapters that feed the head features of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vizattn.adapters.anatomy import classifiers
from vizattn.adapters.edits import Edits
from vizattn.errors import VizattnError

__all__ = ["classify", "normalise", "own_head"]


def own_head(model: nn.Module, in_features: int, edits: Edits) -> None:
    """Put a new linear layer in the place of the model's classifier; nothing happens where there is none."""
    for i, (name, old) in enumerate(classifiers(model)):
        owner, _, attribute = name.rpartition(".")
        like = next(model.parameters())
        head: nn.Module = nn.Identity()
        if i == 0:
            head = nn.Linear(in_features, old.out_features, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        edits.set(model.get_submodule(owner), attribute, head)


def normalise(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Features (B, C) by the statistics of the batch.

    Raises:
        VizattnError: one image to train on.
    """
    if norm.training and len(x) == 1:
        raise VizattnError(
            "The head of this adapter normalises by the statistics of a batch, and cannot train on a single image. "
            "Use a batch size of 2 or more (data.batch_size in recipes)."
        )
    return norm(x)


def classify(model: Any, x: Tensor) -> Tensor:
    """Features (B, D) to logits by the classifier that `own_head` put in; the first, where a model has two."""
    head = model.get_classifier()
    return (head[0] if isinstance(head, tuple) else head)(x)
