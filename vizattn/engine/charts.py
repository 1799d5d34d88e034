"""Line charts as SVG inside a page: matplotlib takes longer for three of them than many a run for an epoch."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = ["line_chart"]

_WIDTH, _HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 26, 34


def line_chart(points: Sequence[tuple[float, float]], title: str, x_title: str = "iteration") -> str:
    """(x, y) points joined by a line, dots where they are few; values that are no numbers are left out."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    xs, ys = (
        _Axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT),
        _Axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP),
    )
    line = " ".join(f"{xs.place(x):.1f},{ys.place(y):.1f}" for x, y in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>']
    if len(points) < 30:
        parts += [f'<circle cx="{xs.place(x):.1f}" cy="{ys.place(y):.1f}" r="2.5" fill="#1f5fa8"/>' for x, y in points]
    for tick in ys.ticks:
        y = ys.place(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 3.5, f"{tick:.4g}", "end"))
    for tick in xs.ticks:
        parts.append(_text(xs.place(tick), _HEIGHT - _BOTTOM + 14, f"{tick:,.6g}", "middle"))
    parts.append(_text(_WIDTH / 2, 14, title, "middle", size=12))
    parts.append(_text(_WIDTH / 2, _HEIGHT - 4, x_title, "middle"))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{html.escape(title)}" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


class _Axis:
    """Values along one side of a chart, from pixel `start` to pixel `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.low, self.high, self.start, self.end = low, high, start, end
        step = 10 ** math.floor(math.log10((high - low) / 2))
        step = next(step * factor for factor in (5, 2, 1, 0.5) if (high - low) / (step * factor) >= 2)
        self.ticks = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _text(x: float, y: float, text: str, anchor: str, size: int = 10) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'
