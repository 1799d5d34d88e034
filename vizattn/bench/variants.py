"""Ways to run a model: "eager", or any of "compile", "channels_last" and "fuse", joined by "+"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vizattn.bench.case import DTYPES
from vizattn.errors import VizattnError, unknown
from vizattn.fuse import fuse

__all__ = ["VARIANTS", "check_variants", "prepare"]

VARIANTS = ("eager", "compile", "channels_last", "fuse")


def check_variants(variants: Sequence[str], allowed: Sequence[str] = VARIANTS) -> None:
    """See that each is made of known parts.

    Raises:
        VizattnError: It is not.
    """
    for variant in variants:
        parts = variant.split("+")
        for part in parts:
            if part not in allowed:
                raise unknown("variant", part, allowed)
        if len(parts) > 1 and ("eager" in parts or len(set(parts)) < len(parts)):
            raise VizattnError(f"The variant {variant!r} joins what does not go together: eager stands alone.")


def prepare(model: nn.Module, x: Tensor, variant: str, dtype: str) -> tuple[nn.Module, Any, Tensor]:
    """The model as `variant` runs it, the same called through its compiled form (if it has one), and its input.

    Weights and input become `dtype`; "amp" is left to an autocast around the call.
    """
    parts = variant.split("+")
    model, x = model.to(DTYPES[dtype]), x.to(DTYPES[dtype])
    if "fuse" in parts:
        fuse(model)
    if "channels_last" in parts:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return model, torch.compile(model) if "compile" in parts else model, x
