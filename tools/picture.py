"""Diagrams as small SVG files: boxes, arrows, text and grids, whose lines have the colour of the text around them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

__all__ = ["FROZEN", "PLAIN", "TRAINED", "Picture"]

FROZEN, TRAINED, PLAIN = "frozen", "trained", "plain"
FILL = {FROZEN: "#b9c9db", TRAINED: "#f6b26b", PLAIN: "none"}
EDGE = {FROZEN: "#6584a3", TRAINED: "#c0701a", PLAIN: "currentColor"}
INK = "#17202a"  # on the fills, which are the same on light and on dark
QUERY, KEY, FAINT = "#d9480f", "#7fa3c7", "0.18"

Point = tuple[float, float]


class Picture:
    """A canvas; coordinates are pixels from the top left corner.

    Args:
        title: What it shows, for those who do not see it.
        width: Of the canvas.
        height: Of the canvas.
    """

    def __init__(self, title: str, width: float, height: float) -> None:
        self.title, self.width, self.height = title, width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, label: str = "", kind: str = FROZEN) -> None:
        """A rounded box around the point (x, y); lines of the label are separated by a newline."""
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="5" '
            f'fill="{FILL[kind]}" stroke="{EDGE[kind]}"/>'
        )
        self.text(x, y, label, colour="currentColor" if kind == PLAIN else INK)

    def text(
        self, x: float, y: float, label: str, *, anchor: str = "middle", size: int = 13, colour: str = "currentColor"
    ) -> None:
        """Lines of text around the point (x, y)."""
        lines = label.split("\n") if label else []
        for i, line in enumerate(lines):
            below = y + 0.35 * size + (i - (len(lines) - 1) / 2) * 1.2 * size
            self.parts.append(
                f'<text x="{x:g}" y="{below:.4g}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
                f"{escape(line, quote=False)}</text>"
            )

    def line(self, *points: Point, arrow: bool = True, dashed: bool = False) -> None:
        """A line through points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        more = ' marker-end="url(#head)"' * arrow + ' stroke-dasharray="4 3"' * dashed
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor"{more}/>')

    def frame(self, left: float, top: float, width: float, height: float) -> None:
        """A dashed frame."""
        self.parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="8" fill="none" '
            'stroke="currentColor" stroke-dasharray="4 3" opacity="0.6"/>'
        )

    def sum(self, x: float, y: float, label: str = "+") -> None:
        """A circle in which things are added."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="none" stroke="currentColor"/>')
        self.text(x, y, label)

    def legend(self, x: float, y: float) -> None:
        """What the two colours mean, from (x, y) on to the right."""
        for i, kind in enumerate((FROZEN, TRAINED)):
            self.box(x + 8 + 90 * i, y, 16, 12, kind=kind)
            self.text(x + 22 + 90 * i, y, kind, anchor="start", size=12)

    def grid(
        self,
        left: float,
        top: float,
        rows: int,
        columns: int,
        cell: float,
        *,
        keys: Collection[tuple[int, int]] = (),
        query: tuple[int, int] | None = None,
        lines: Sequence[int] = (),
    ) -> None:
        """A grid of tokens: a query, the keys that it sees, and heavier lines before some rows and columns."""
        self.parts.append('<g stroke="currentColor">')
        width, height = columns * cell, rows * cell
        every = [(f"M{left:g} {top + i * cell:g}h{width:g}", i in lines) for i in range(rows + 1)]
        every += [(f"M{left + i * cell:g} {top:g}v{height:g}", i in lines) for i in range(columns + 1)]
        cells: dict[str, list[str]] = {KEY: [], QUERY: []}
        for y, x in sorted({*keys, *([query] if query else [])}):
            cells[QUERY if (y, x) == query else KEY].append(
                f"M{left + x * cell:g} {top + y * cell:g}h{cell:g}v{cell:g}h{-cell:g}z"
            )
        for colour, squares in cells.items():
            if squares:
                self.parts.append(f'<path d="{"".join(squares)}" fill="{colour}" stroke="none"/>')
        faint, heavy = ("".join(d for d, is_heavy in every if is_heavy == wanted) for wanted in (False, True))
        self.parts.append(f'<path d="{faint}" fill="none" opacity="{FAINT}"/>')
        if heavy:
            self.parts.append(f'<path d="{heavy}" fill="none" opacity="0.75" stroke-width="1.5"/>')
        self.parts.append("</g>")

    def svg(self) -> str:
        """The file: its style is for where it stands alone."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" role="img" font-family="system-ui, sans-serif">\n'
            "<style>svg { color: #24292f } @media (prefers-color-scheme: dark) { svg { color: #d8dee4 } }</style>\n"
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0.5L8 4L0 7.5z" fill="currentColor"/></marker></defs>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )
