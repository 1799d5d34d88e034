"""Attention Projection Layer Adaptation, arXiv:2503.11335: train some rows of each attention's output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy
from vizattn.adapters.base import register
from vizattn.adapters.edits import Edits
from vizattn.errors import VizattnError

__all__ = ["APLA", "PartialLinear"]


@register("apla")
@dataclass(frozen=True)
class APLA:
    """Attention Projection Layer Adaptation: train randomly chosen rows of every attention's output projection."""

    num_rows: int = 128
    """Output rows trained in each block, with their bias entries; the width or more trains the whole projection."""
    seed: int = 0
    """Chooses the rows; the choice is saved with the adapter."""

    needs_anatomy: ClassVar[bool] = True
    mergeable: ClassVar[Literal[True]] = True
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = False
    composes_with: ClassVar[tuple[str, ...]] = ("vpt", "efficient_probing")
    cache_level: ClassVar[None] = None
    trains_backbone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise VizattnError(f"apla: seed must not be negative, got {self.seed}.")
        if self.num_rows < 1:
            raise VizattnError(f"apla: num_rows must be at least 1, got {self.num_rows}.")

    def attach(self, model: nn.Module, anatomy: Anatomy, edits: Edits) -> None:
        """Replace each output projection by one that trains some of its rows."""
        generator = torch.Generator().manual_seed(self.seed)
        for owner, name in (b.projection for b in anatomy.blocks):
            projection = getattr(owner, name)
            indices = torch.randperm(len(projection.weight), generator=generator)[: self.num_rows].sort().values
            edits.set(owner, name, PartialLinear(projection, indices))


class PartialLinear(nn.Module):
    """A linear layer (..., D_in) -> (..., D_out) of which only the rows `indices` are trained.

    Or a 1 x 1 convolution (B, D_in, H, W) -> (B, D_out, H, W), which is the same on every position. It shares the
    frozen weight and bias of `linear`, which stay as they are. Frozen rows cost neither gradient memory nor time: the
    weight's gradient is one product with `num_rows` instead of D_out columns.
    """

    def __init__(self, linear: nn.Linear | nn.Conv2d, indices: Tensor) -> None:
        super().__init__()
        self.weight: Tensor = linear.weight
        self.bias: Tensor | None = linear.bias
        self.kind = type(linear)
        indices = indices.to(linear.weight.device)
        self.indices: Tensor
        self.register_buffer("indices", indices)
        self.rows = nn.Parameter(linear.weight.detach()[indices].clone())
        self.row_bias = None if linear.bias is None else nn.Parameter(linear.bias.detach()[indices].clone())

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (D_out, D_in, ...) and bias (D_out) with the trained rows in place, detached."""
        weight = self.weight.detach().index_copy(0, self.indices, self.rows.detach())
        if self.bias is None or self.row_bias is None:
            return weight, None
        return weight, self.bias.detach().index_copy(0, self.indices, self.row_bias.detach())

    def merged_weights(self) -> list[tuple[Tensor, Tensor]]:
        """(frozen tensor, value it has after merging)."""
        weight, bias = self.merged()
        pairs = [(self.weight, weight)]
        if self.bias is not None and bias is not None:
            pairs.append((self.bias, bias))
        return pairs

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        if not torch.is_grad_enabled():  # the layer's own way in inference: no bit changes by attaching or merging
            merged = _Merged(*self.merged())
            return _apply(x, *merged) if merged.weight.ndim == 4 else self.kind.forward(merged, x)  # type: ignore[arg-type]
        tensors = (x, self.weight.detach(), self.rows, self.bias, self.row_bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(t if t is None else t.to(dtype) for t in tensors)  # type: ignore[assignment]
        return _TrainedRows.apply(*tensors, self.indices)


class _Merged(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if weight.ndim == 2 else F.conv2d(x, weight, bias)


class _TrainedRows(torch.autograd.Function):
    """A linear layer with `rows` in the place of some rows of `weight`; the gradient reaches x and the rows only.

    The weight with its rows in place is made again in backward rather than kept.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None, row_bias: Tensor | None, indices: Tensor
    ) -> Tensor:
        if bias is not None and row_bias is not None:
            bias = bias.index_copy(0, indices, row_bias)
        return _apply(x, weight.index_copy(0, indices, rows), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, rows, _, row_bias, indices = inputs
        ctx.save_for_backward(x, weight, rows, indices)
        ctx.has_bias = row_bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, indices = ctx.saved_tensors
        channels = -1 if weight.ndim == 2 else 1
        x, grad = x.movedim(channels, -1), grad.movedim(channels, -1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.index_copy(0, indices, rows).flatten(1)).movedim(-1, channels)
        chosen = grad.flatten(0, -2).index_select(1, indices)
        grad_rows = (chosen.t() @ x.flatten(0, -2)).view_as(rows)
        return grad_x, None, grad_rows, None, chosen.sum(0) if ctx.has_bias else None, None
