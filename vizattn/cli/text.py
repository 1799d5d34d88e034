"""Plain text for terminals, pipes and files alike: nothing is cut to the width of a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["cell", "columns", "printable"]


def columns(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of `rows`, which all have the keys of the first; numbers stand to the right."""
    keys = list(rows[0])
    lines = [keys, *([cell(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    numeric = [all(type(row[key]) in (int, float, type(None)) for row in rows) for key in keys]
    aligned = (
        (cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric))
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def cell(value: object) -> str:
    """One value as people read it; a list of numbers is a size."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return (" x " if isinstance(value[0], int) else ", ").join(map(str, value))
    return printable(str(value))


def printable(text: str) -> str:
    """The text on one line: what ends lines or steers a terminal, as names of files may, is written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
