"""Tokens inserted before a block and taken out after it: every path through a model sees its own tokens only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy, attend
from vizattn.adapters.edits import Edits

__all__ = ["TokenSource", "insert_tokens"]


class TokenSource(Protocol):
    """What gives the tokens of each block, and gets what became of them."""

    def tokens_before(self, index: int, x: Tensor) -> Tensor:
        """Tokens (B, P, D) to insert before block `index`, whose input is `x` (B, N, D)."""

    def tokens_after(self, index: int, tokens: Tensor, x: Tensor) -> None:
        """What block `index` made of the inserted tokens (B, P, D) and of the model's own `x` (B, N, D)."""


class _AroundBlock:
    def __init__(self, source: TokenSource, index: int, count: int) -> None:
        self.source, self.index, self.count = source, index, count

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return torch.cat([self.source.tokens_before(self.index, x).to(x.dtype), x], dim=1), *args[1:]

    def after(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        self.source.tokens_after(self.index, out[:, : self.count], out[:, self.count :])
        return out[:, self.count :]


class _InsertedAttention:
    """One of timm's attentions whose rotations, relative positions and masks leave the inserted tokens out."""

    def __init__(self, attn: nn.Module, count: int) -> None:
        self.attn, self.count = attn, count

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return attend(self.attn, x, None, self.count, **kwargs)


def insert_tokens(anatomy: Anatomy, edits: Edits, source: TokenSource, count: int) -> None:
    """Insert `count` tokens of `source` in front of the tokens of every block; they carry no position.

    Self-attention does not see the order of tokens, so the front is as good as any place.
    """
    for i, b in enumerate(anatomy.blocks):
        around = _AroundBlock(source, i, count)
        edits.before(b.block, around.before)
        edits.after(b.block, around.after)
        if not b.protocol:
            edits.set(b.attn, "forward", _InsertedAttention(b.attn, count).forward)
