"""Visual Prompt Tuning, arXiv:2203.12119: learnt tokens beside the image's, everything else frozen.

Deep prompts are thrown away after their block, so nobody ever reads what they attend to: they are only keys and values.
These do not depend on the image and are computed once a forward for the whole batch, instead of pushing the prompts
through every block. The outputs are those of the published method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy, BlockAnatomy
from vizattn.adapters.base import register
from vizattn.adapters.edits import Edits
from vizattn.adapters.tokens import insert_tokens
from vizattn.errors import VizattnError

__all__ = ["VPT"]


@register("vpt")
@dataclass(frozen=True)
class VPT:
    """Visual Prompt Tuning: learnt prompt tokens at every block (deep) or at the first (shallow)."""

    num_tokens: int = 50
    """Prompts a block (deep), or in all (shallow)."""
    deep: bool = True
    """Fresh prompts at every block; False carries one set through all blocks."""
    dropout: float = 0.0
    """Dropout on the prompts while training; the paper uses 0.1 for deep prompts."""
    project: int | None = None
    """Width of the prompts where it is not the model's: a learnt linear layer, shared by all blocks, maps them."""

    needs_anatomy: ClassVar[bool] = True
    mergeable: ClassVar[str] = "prompts are extra keys and values, which no weight of the backbone can hold"
    hierarchical: ClassVar[bool] = True
    extra_tokens: ClassVar[bool] = True
    composes_with: ClassVar[tuple[str, ...]] = ("apla", "efficient_probing")
    cache_level: ClassVar[None] = None
    trains_backbone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise VizattnError(f"vpt: num_tokens must be at least 1, got {self.num_tokens}.")
        if self.project is not None and self.project < 1:
            raise VizattnError(f"vpt: project must be at least 1, or None, got {self.project}.")
        if not 0.0 <= self.dropout < 1.0:
            raise VizattnError(f"vpt: dropout must lie in [0, 1), got {self.dropout}.")

    def attach(self, model: nn.Module, anatomy: Anatomy, edits: Edits) -> nn.Module:
        """Insert the prompts; returns the module that holds them.

        Raises:
            VizattnError: shallow prompts or projected ones on a hierarchical model.
        """
        if not anatomy.isotropic and (not self.deep or self.project):
            raise VizattnError("Cannot attach 'vpt': on hierarchical backbones prompts must be deep and not projected.")
        blocks = anatomy.blocks if self.deep else anatomy.blocks[:1]
        prompts = Prompts([b.dim for b in blocks], _patch_area(model), self)
        if self.deep:
            for i, block in enumerate(blocks):
                edits.set(block.attn, "forward", _PromptedAttention(prompts, i, block).forward)
        else:
            insert_tokens(anatomy, edits, prompts, self.num_tokens)
        return prompts


class Prompts(nn.Module):
    """The prompts of all blocks, (num_tokens, dim) each, uniform in +-sqrt(6 / (3 * patch area + dim))."""

    carried: dict[int, Tensor] | None = None

    def __init__(self, dims: list[int], patch_area: int, options: VPT) -> None:
        super().__init__()
        self.dropout = options.dropout
        self.projection = nn.Linear(options.project, dims[0]) if options.project else nn.Identity()
        if options.project:
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")  # type: ignore[arg-type]
        self.prompts = nn.ParameterList()
        for dim in dims:
            bound = math.sqrt(6 / (3 * patch_area + dim))
            shape = (options.num_tokens, options.project or dim)
            self.prompts.append(nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def __getstate__(self) -> dict[str, Any]:  # tensors of a running forward are not part of a copy
        return {k: v for k, v in self.__dict__.items() if k != "carried"}

    def tokens(self, index: int, batch: int) -> Tensor:
        """The prompts of a block, (1, P, D); (batch, P, D) where dropout makes them differ."""
        prompts = self.projection(self.prompts[index])[None]
        if self.training and self.dropout > 0.0:
            return F.dropout(prompts.expand(batch, -1, -1), self.dropout)
        return prompts

    # Shallow prompts travel beside the model's tokens from block to block. They are kept by index, so that a block
    # recomputed by gradient checkpointing finds its own.

    def tokens_before(self, index: int, x: Tensor) -> Tensor:
        """See `TokenSource`."""
        if index == 0:
            self.carried = {}
            return self.tokens(0, x.shape[0]).expand(x.shape[0], -1, -1)
        assert self.carried is not None
        return self.carried[index]

    def tokens_after(self, index: int, tokens: Tensor, x: Tensor) -> None:
        """See `TokenSource`."""
        assert self.carried is not None
        self.carried[index + 1] = tokens


class _PromptedAttention:
    """An attention whose tokens may also attend to the prompts of its block."""

    def __init__(self, prompts: Prompts, index: int, block: BlockAnatomy) -> None:
        self.prompts, self.index, self.block = prompts, index, block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.block.attend(x, self.extra_kv(x.shape[0]), *args, **kwargs)

    def extra_kv(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.block.project_kv(self.prompts.tokens(self.index, batch))


def _patch_area(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # the patch embedding comes first
            return module.kernel_size[0] * module.kernel_size[1]
    return 1
