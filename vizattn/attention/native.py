"""A small library for attention on a CPU, compiled when vizattn is installed.

It is there where a C++ compiler was, and works in float32; nothing needs it. With `VIZATTN_NATIVE=0` in the environment
it is not used.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from vizattn.compiled import load
from vizattn.layers.eager import eager

__all__ = [
    "LANES",
    "addresses",
    "call",
    "layout",
    "library",
    "like",
    "readable",
    "ready",
    "side_by_side",
    "steps",
    "takes",
    "unused",
    "usable",
]

#: Channels are a multiple of this, and so are the queries of a tile.
LANES = 16

#: At most so many floats of a vector are used; fewer where a processor's are smaller.
_lanes = LANES

#: Of each task: lanes and threads.
_END = struct.Struct("@2q")

#: The compiled library, if there is one; None leaves it unused.
library = _compiled = load()[0]


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Within, torch computes all of it. Of the whole process, not of a thread."""
    global library
    before, library = library, None
    try:
        yield
    finally:
        library = before


def takes(*tokens: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether queries, keys and values, each (..., channels), are what the library computes with, of this type."""
    for x in tokens:
        channels = x.shape[-1]
        if not channels or channels % LANES or x.dtype is not dtype or not x.is_cpu:
            return False
    return True


def usable(*tokens: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the library is there for queries, keys and values, each (..., channels), for which `eager` holds.

    What looks on while torch works, such as compilers and counters of operations, cannot see it.
    """
    if torch.compiler.is_compiling() or library is None or torch._C._len_torch_dispatch_stack():
        return False
    return takes(*tokens, dtype=dtype)


def ready(*tensors: Tensor | None) -> bool:
    """Whether the library is there, `eager` holds for `tensors`, and all are float32 in the CPU's memory.

    As `usable`, but for the channels, with few calls: over few tokens each is felt.
    """
    if torch.compiler.is_compiling() or library is None or torch._C._len_torch_dispatch_stack() or not eager(*tensors):
        return False
    for x in tensors:
        if x is not None and (x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided):
            return False
    return True


def side_by_side(x: Tensor) -> Tensor:
    """`x` with the channels of a token next to each other, as the library reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(grad: Tensor) -> Tensor:
    """`grad` as numbers in memory, the channels of a token next to each other."""
    return side_by_side((grad.clone() if grad._is_zerotensor() else grad).resolve_neg())


def like(x: Tensor) -> Tensor:
    """Room for the gradient of `x`, in the order that `x` has in memory."""
    return side_by_side(torch.empty_like(x))


def layout(tensors: int, numbers: int) -> struct.Struct:
    """Of a task in the sources but for its end: a float, addresses of tensors, whole numbers."""
    return struct.Struct(f"@f{tensors}P{numbers}q")


def addresses(*tensors: Tensor | None) -> list[int]:
    """For the layout; None is no tensor."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def steps(*tensors: Tensor | None) -> list[int]:
    """For the layout: floats to the next one along each dimension but the channels, which lie side by side."""
    return [step for x in tensors for step in ((0, 0, 0) if x is None else x.stride()[:3])]


def call(function: str, layout: struct.Struct, *task: float, numbers: bytes = b"") -> None:
    """Let the library do a task, which may go on with packed numbers, by the threads that torch has."""
    getattr(_compiled, function)(layout.pack(*task) + numbers + _END.pack(_lanes, torch.get_num_threads()))
