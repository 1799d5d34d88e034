"""Two results of the same cases, held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vizattn.bench.rows import Row
from vizattn.errors import VizattnError

__all__ = ["Change", "compare"]

_MARGIN = 1.05  # what the median must change by, beside quartiles that do not overlap


@dataclass(frozen=True)
class Change:
    """One case in both results."""

    row: Row
    unit: str
    """In what it is compared: "seconds", or the reference whose time is the unit."""
    before: float
    now: float
    memory_before: float | None
    verdict: str
    """"faster", "slower" or "same"."""


def compare(new: Sequence[Row], old: Sequence[Row]) -> list[Change]:
    """What became of the cases that both results have.

    Times are compared in units of the comparison's reference, so that another load or another machine matters less;
    those of the reference itself, or without one, in seconds, only where both were measured on one machine. A change
    counts if the medians differ by 5 % and the spreads do not overlap.

    Raises:
        VizattnError: The results have no case in common.
    """
    before = {row.key: row for row in old if row.seconds is not None}
    changes = []
    for row in new:
        earlier = before.get(row.key)
        if earlier is None or row.seconds is None:
            continue
        measured = row.ratios is not None and earlier.ratios is not None
        relative = measured and row.reference == earlier.reference and row.reference != row.name
        if not relative and row.machine != earlier.machine:
            continue
        now, then = (_figures(r, relative) for r in (row, earlier))
        changes.append(
            Change(
                row,
                row.reference if relative else "seconds",
                then[1],
                now[1],
                earlier.run_mb,
                _verdict(now, then),
            )
        )
    if not changes:
        raise VizattnError("The two results have no case in common: measure with the options of the older one.")
    return changes


def _figures(row: Row, relative: bool) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    figures = (
        (row.ratio_low, row.ratio, row.ratio_high) if relative else (row.seconds_low, row.seconds, row.seconds_high)
    )
    low, middle, high = (0.0 if figure is None else figure for figure in figures)
    return low, middle, high


def _verdict(now: tuple[float, float, float], then: tuple[float, float, float]) -> str:
    if now[1] * _MARGIN < then[1] and now[2] < then[0]:
        return "faster"
    if now[1] > then[1] * _MARGIN and now[0] > then[2]:
        return "slower"
    return "same"
