"""A process for one measurement."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

__all__ = ["in_child"]

T = TypeVar("T")


def in_child(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a process of its own, in which nothing was run before."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["timm", "vizattn", "vizattn.bench.groups"])  # seconds for each process
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_with_start_method, methods[0], function, args).result()


def _with_start_method(method: str, function: Callable[..., T], args: Sequence[Any]) -> T:
    """Workers of a loader start as they do elsewhere, not as this process did."""
    multiprocessing.set_start_method(method, force=True)
    return function(*args)
