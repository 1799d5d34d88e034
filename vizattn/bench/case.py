"""What is measured: cases, each built in the process that measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "Case", "Options", "Unavailable", "Work", "autocast", "differentiate"]

#: Types of weights and inputs; "amp" is float32 under bfloat16 autocast.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}


class Unavailable(Exception):
    """A case that cannot be measured here, such as one of a library that is not installed; the message says why."""


@dataclass(frozen=True)
class Work:
    """A case that is ready to run."""

    run: Callable[[], object]
    """What is timed."""
    macs: float | None = None
    """Multiply-adds of one run by the definition of what is computed; None: those that `counted` really does."""
    counted: Callable[[], object] | None = None
    """`run` without compilation, which hides its products from the counter; by default `run` itself."""
    images: int = 0
    """Images that one run handles; 0 where there are none to speak of."""


@dataclass(frozen=True)
class Case:
    """One thing to measure. Those of equal `comparison` are measured together, in turn."""

    group: str
    subject: str
    """What is compared: an attention, a backbone, a stage of loading."""
    name: str
    """Whose it is: ours, or which peer's."""
    build: Callable[[], Work]
    """Runs in another process: a function at the top of a module, or a partial of one, with plain arguments."""
    mode: str
    batch: int = 1
    size: str = ""
    dtype: str = ""
    variant: str = "eager"
    reference: bool = False
    """The one whose time is the unit of its comparison."""
    ours: bool = False
    arithmetic: bool = True
    """Whether multiply-adds and memory of it mean something."""

    @property
    def comparison(self) -> tuple[str, ...]:
        """Equal for what is measured together."""
        return self.group, self.subject, self.mode, str(self.batch), self.size, self.dtype


@dataclass(frozen=True)
class Options:
    """What to measure; None leaves it to the group, and each group uses what it knows (`Group.takes`)."""

    modes: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    """Heights and widths: of the map of tokens for ops, else of images, in pixels."""
    dtypes: tuple[str, ...] = ("fp32",)
    variants: tuple[str, ...] = ("eager",)
    """Ways to run a model, each of "eager", "compile", "channels_last" and "fuse", or several joined by "+"."""
    models: tuple[str, ...] | None = None
    heads: int = 4
    dim: int = 32
    """Channels a head, for ops."""
    folder: Path | None = None
    """Where a group may put files that its cases read."""


def autocast(dtype: str) -> Any:
    """The context in which a case of this type runs."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "amp")


def differentiate(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of all `inputs` for an output gradient of ones, nothing accumulated."""
    return torch.autograd.grad(output, inputs, torch.ones_like(output))
