"""All cases of the campaign."""

from __future__ import annotations

from faults import clocks, disks, files, kills, lines, workers
from faults.campaign import Case

__all__ = ["all_cases"]


def all_cases() -> list[Case]:
    """Every case, the kinds in turn."""
    return [*kills.CASES, *disks.CASES, *clocks.CASES, *files.CASES, *lines.CASES, *workers.CASES]
