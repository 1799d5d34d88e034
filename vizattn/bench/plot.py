"""A picture of a result: times in units of the reference, and how they grow where there are several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vizattn.bench.rows import Row
from vizattn.files import replacing

__all__ = ["draw"]

_COLUMNS = 3


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a picture in the format of `path`'s suffix, a panel a comparison; rows without a time are left out."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = sorted((row for row in rows if row.seconds is not None), key=_panel)  # stable: the order of the sizes stays
    panels = [list(members) for _, members in groupby(timed, key=_panel)]
    count = max(1, -(-len(panels) // _COLUMNS))
    figure = Figure(figsize=(5 * _COLUMNS, 3 * count), layout="constrained")
    FigureCanvasAgg(figure)
    for place, members in enumerate(panels, 1):
        axes = figure.add_subplot(count, _COLUMNS, place)
        first = members[0]
        sizes = list(dict.fromkeys(row.size for row in members))
        size = sizes[0] if len(sizes) == 1 else ""
        words = [first.subject, first.mode, f"batch {first.batch}" if first.batch else "", size, first.dtype]
        axes.set_title(" ".join(filter(None, words)), size=9)
        axes.tick_params(labelsize=7)
        if len(sizes) > 1:
            _growth(axes, members)
        else:
            _bars(axes, members)
    with replacing(path) as temporary, rc_context({"svg.fonttype": "none"}):  # letters as text are small
        figure.savefig(temporary, format=path.suffix[1:])


def _panel(row: Row) -> tuple[str, str, str, int, str]:
    return row.group, row.subject, row.mode, row.batch, row.dtype


def _label(row: Row) -> str:
    return row.name if row.variant == "eager" else f"{row.name}, {row.variant}"


def _bars(axes: Any, rows: list[Row]) -> None:
    """One bar a case; lines are the quartiles."""
    relative = all(row.ratios for row in rows)
    figures = [(row.ratios if relative else row.times) or (0.0, 0.0, 0.0) for row in rows]
    middle = [median for _, median, _ in figures]
    around = [[median - low for low, median, _ in figures], [high - median for _, median, high in figures]]
    colours = ["C0" if row.ours else "0.6" for row in rows]
    axes.barh([_label(row) for row in rows], middle, xerr=around, color=colours, error_kw={"lw": 0.8})
    axes.invert_yaxis()
    axes.set_xlabel(f"time in units of {rows[0].reference}" if relative else "seconds", size=7)


def _growth(axes: Any, rows: list[Row]) -> None:
    """Time by area, both on logarithmic axes."""
    for label in dict.fromkeys(map(_label, rows)):
        line = sorted((_area(row.size), row.seconds) for row in rows if _label(row) == label)
        axes.loglog([area for area, _ in line], [seconds for _, seconds in line], marker="o", ms=3, lw=1, label=label)
    axes.set_xlabel("tokens" if rows[0].group == "ops" else "pixels", size=7)
    axes.set_ylabel("seconds", size=7)
    axes.legend(fontsize=6)


def _area(size: str) -> int:
    height, _, width = size.partition("x")
    return int(height) * int(width)
