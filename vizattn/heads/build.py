"""Heads by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from vizattn.errors import VizattnError, unknown
from vizattn.heads.fcn import FCN
from vizattn.heads.linear import Linear
from vizattn.heads.semantic_fpn import SemanticFPN
from vizattn.heads.setr_pup import SETRPUP
from vizattn.heads.upernet import UPerNet

__all__ = ["HEADS", "build", "head_class"]

HEADS: dict[str, Any] = {
    "fcn": FCN,
    "linear": Linear,
    "semantic_fpn": SemanticFPN,
    "setr_pup": SETRPUP,
    "upernet": UPerNet,
}
"""The segmentation heads."""


def head_class(name: str) -> Any:
    """The class of a head.

    Raises:
        VizattnError: no head has this name.
    """
    if name not in HEADS:
        raise unknown("segmentation head", name, HEADS)
    return HEADS[name]


def build(name: str, channels: Sequence[int], strides: Sequence[int], num_classes: int, /, **options: Any) -> Any:
    """A head for maps of these channels and strides (in pixels of the image), finest first.

    Raises:
        VizattnError: an unknown name or option, or no classes.
    """
    cls = head_class(name)
    parameters = inspect.signature(cls).parameters.values()
    choices = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in choices:
            raise (
                unknown(f"option of the head {name!r}", option, choices)
                if choices
                else VizattnError(f"The head {name!r} has no options, got {option!r}.")
            )
    if num_classes < 1:
        raise VizattnError(f"A segmentation head needs at least one class, got num_classes={num_classes}.")
    return cls(channels, strides, num_classes, **options)
