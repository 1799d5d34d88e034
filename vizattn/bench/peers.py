"""What other libraries offer, where they are installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vizattn.bench.case import Unavailable

__all__ = ["flex_neighborhood", "lora", "natten_neighborhood"]


def _demand(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def natten_neighborhood(kernel: int, dilation: int) -> Callable[..., Tensor]:
    """natten's neighborhood attention over (B, H, W, h, d); on the CPU its Flex backend, without a backward pass.

    Raises:
        Unavailable: natten is not installed.
    """
    _demand("natten")
    import natten

    return functools.partial(natten.na2d, kernel_size=kernel, dilation=dilation)


def flex_neighborhood(grid: tuple[int, int], kernel: int, dilation: int, compiled: bool) -> Callable[..., Tensor]:
    """torch's flex_attention over (B, h, N, d) with the mask of neighborhood attention; no backward pass on the CPU.

    Raises:
        Unavailable: This torch has no flex_attention.
    """
    _demand("torch.nn.attention.flex_attention")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    H, W = grid
    # First key of each row and column; a position of another residue class is never seen.
    first = [_first(length, kernel, dilation) for length in grid]

    def near(start: Tensor, query: Tensor, key: Tensor) -> Tensor:
        within = (key >= start[query]) & (key < start[query] + kernel * dilation)
        return within & ((key - query) % dilation == 0)

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return near(first[0], query // W, key // W) & near(first[1], query % W, key % W)

    blocks = create_block_mask(mask, None, None, H * W, H * W, device="cpu")
    attend: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return functools.partial(attend, block_mask=blocks)


def _first(length: int, kernel: int, dilation: int) -> Tensor:
    from vizattn.bench.naive import neighborhood_keys

    return neighborhood_keys(length, kernel, dilation)[:, 0].contiguous()


def lora(model: nn.Module, rank: int) -> nn.Module:
    """peft's LoRA (2106.09685) on queries, keys and values of a ViT; its head is trained, too.

    Raises:
        Unavailable: peft is not installed.
    """
    _demand("peft")
    import peft

    options = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"], modules_to_save=["head"])
    wrapped: nn.Module = peft.get_peft_model(model, options)
    return wrapped
