"""A small library for attention on a CPU, compiled when vizattn is installed.

It is there where a C++ compiler was, and works in float32; nothing needs it. With `VIZATTN_NATIVE=0` in the environment
it is not used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["LANES", "STEPS", "call", "library", "set_steps", "side_by_side", "takes", "unused", "usable"]

#: Channels are a multiple of this, and so are the queries of a tile.
LANES = 16

#: At most so many floats of a vector are used; fewer where a processor's are smaller.
_lanes = LANES

#: Of all tasks, as in tiles.cpp: a library compiled from an older source is not used.
_VERSION = 4

#: Fields of a task: floats from an image, a token and a head to the next, of inputs, the output, and gradients.
STEPS = ("query_step", "key_step", "value_step", "out_step", "d_query_step", "d_key_step", "d_value_step")


def _load() -> ctypes.CDLL | None:
    if os.environ.get("VIZATTN_NATIVE") == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                found.version.restype = ctypes.c_int64
                return found if found.version() == _VERSION else None
            except (OSError, AttributeError):  # of another system, or something else of this name
                return None
    return None


#: The compiled library, if there is one; None leaves it unused.
library = _compiled = _load()


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Within, torch computes all of it. Of the whole process, not of a thread."""
    global library
    before, library = library, None
    try:
        yield
    finally:
        library = before


def takes(*tokens: Tensor) -> bool:
    """Whether queries, keys and values, each (..., channels), are what the library computes with."""
    return all(
        x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] > 0 and x.shape[-1] % LANES == 0
        for x in tokens
    )


def usable(*tokens: Tensor) -> bool:
    """Whether the library is there for queries, keys and values, each (..., channels).

    It cannot be seen by what looks on while torch works, such as compilers and counters of operations.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        library is not None
        and torch._C._len_torch_dispatch_stack() == 0
        and takes(*tokens)
        and not any(x.is_neg() for x in tokens)
    )


def side_by_side(x: Tensor) -> Tensor:
    """`x` with the channels of a token next to each other, as the library reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def set_steps(task: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Fields of a task from tensors (images, tokens, heads, channels), whose channels lie side by side."""
    for name, x in zip(names, tensors):
        setattr(task, name, (ctypes.c_int64 * 3)(*x.stride()[:3]))


def call(function: str, task: Any) -> None:
    """Let the library do a task, by the threads that torch has."""
    task.lanes, task.threads = _lanes, torch.get_num_threads()
    getattr(_compiled, function)(ctypes.byref(task))
