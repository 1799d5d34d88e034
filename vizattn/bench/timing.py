"""Measuring: the cases of a comparison in turn in one process, the memory of each in one of its own."""

from __future__ import annotations

import ctypes
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby

import torch

from vizattn.bench.case import DTYPES, Case, Unavailable, Work
from vizattn.bench.children import in_child
from vizattn.bench.macs import count_macs
from vizattn.bench.rows import Row, make_row
from vizattn.memory import PeakMemory, resident_megabytes

__all__ = ["Times", "measure", "memory_of", "time_together"]

_SIDE = 1024  # of the matrices whose product is the machine's peak


@dataclass
class Times:
    """What one process found out about a case."""

    seconds: list[float] = field(default_factory=list)
    """Of one run, in each round."""
    macs: float | None = None
    images: int = 0
    note: str = ""
    """Why there is no time."""


def measure(
    cases: Sequence[Case],
    *,
    rounds: int,
    threads: int,
    least_seconds: float = 0.02,
    memory: bool = True,
    context: dict[str, str] | None = None,
) -> Iterator[list[Row]]:
    """Measure `cases`, and give the rows of each comparison once it is done.

    Args:
        cases: Those of one comparison stand together, one of them its reference.
        rounds: How often each is timed.
        threads: Threads of each case.
        least_seconds: A short case is repeated until one timing takes so long.
        memory: Whether to measure peak memory, in a process for each case.
        context: Columns that all rows share: machine, versions, command.
    """
    for _, together in groupby(cases, key=lambda case: case.comparison):
        members = list(together)
        try:
            times, products = in_child(time_together, members, rounds, threads, least_seconds)
        except BrokenProcessPool:
            times = [Times(note="the process was killed; was there memory enough?") for _ in members]
            products = []
        rows = []
        for case, found in zip(members, times):
            peak: tuple[float, float] | None = None
            if memory and case.arithmetic and not found.note:
                try:
                    peak = in_child(memory_of, case, threads)
                except BrokenProcessPool:
                    found.note = "the process that measures memory was killed"
            rows.append(make_row(case, found, _reference(members, times), products, peak, threads, context or {}))
        yield rows


def _reference(members: Sequence[Case], times: Sequence[Times]) -> tuple[str, list[float]]:
    """Name and seconds of the unit of a comparison."""
    return next(((case.name, found.seconds) for case, found in zip(members, times) if case.reference), ("", []))


def time_together(
    cases: Sequence[Case], rounds: int, threads: int, least_seconds: float
) -> tuple[list[Times], list[float]]:
    """Build all cases, then time them in turn, each round beginning with another one.

    Returns:
        Of each case its times, and the multiply-adds a second of a product of large matrices, once a round.
    """
    warnings.simplefilter("ignore")  # what libraries say of slow paths is what is measured here
    torch.set_num_threads(threads)
    found: list[Times] = [Times() for _ in cases]
    repeats: dict[int, tuple[Work, int]] = {}
    for i, case in enumerate(cases):
        try:
            work = case.build()
            work.run()
            found[i].images = work.images
            if case.arithmetic:
                found[i].macs = work.macs if work.macs is not None else count_macs(work.counted or work.run)
            repeats[i] = work, max(1, round(least_seconds / _seconds(work.run, 1)))
        except Unavailable as reason:
            found[i].note = str(reason)
        except Exception as error:  # each library fails in its own way; the others are still of interest
            found[i].note = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    product = _matrix_product(cases[0].dtype) if cases[0].arithmetic else None
    products: list[float] = []
    order = list(repeats)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            if product is not None:
                products.append(_SIDE**3 / _seconds(product, 2))
            for i in order:
                work, number = repeats[i]
                if number > 1:  # caches as repeated calls find them, not as the other cases left them
                    work.run()
                found[i].seconds.append(_seconds(work.run, number))
            order = [*order[1:], *order[:1]]
    finally:
        gc.enable()
    return found, products


def _seconds(run: Callable[[], object], number: int) -> float:
    """Wall time of one of `number` calls in a row."""
    started = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - started) / number


def _matrix_product(dtype: str) -> Callable[[], object]:
    kind = torch.bfloat16 if dtype == "amp" else DTYPES[dtype]
    a, b = torch.randn(_SIDE, _SIDE).to(kind), torch.randn(_SIDE, _SIDE).to(kind)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def memory_of(case: Case, threads: int) -> tuple[float, float] | None:
    """What the operating system says that a case needs, in megabytes; it should be alone in its process.

    Returns:
        What building it leaves (weights and inputs), and the peak of two runs above that: activations, gradients and
        the state of the optimizer. None if it fails in this process.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    _load_kernels()
    _give_back()
    before = resident_megabytes()
    try:
        work = case.build()
        _give_back()
        built = resident_megabytes()
        peak = PeakMemory(torch.device("cpu"))
        for _ in range(2):
            work.run()
    except Exception:  # told where it was timed
        return None
    return max(built - before, 0.0), max(peak.megabytes() - built, 0.0)


def _give_back() -> None:
    """Memory that is free goes back to the system, or what runs next would seem to need so much less."""
    gc.collect()
    with suppress(OSError, AttributeError):  # of the GNU C library
        ctypes.CDLL(None).malloc_trim(0)


def _load_kernels() -> None:
    """What torch loads and starts at its first products is nobody's own."""
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    torch.nn.functional.conv2d(x, torch.randn(8, 8, 3, 3)).flatten(2).matmul(torch.randn(196, 64)).sum().backward()
