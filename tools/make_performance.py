"""Write the tables of docs/performance.md from the results beside it: `python tools/make_performance.py [--check]`.

A table stands between ``<!-- table: FILE.csv mode=train size=56x56 -->`` and ``<!-- end -->``; only rows with these
values are in it. ``growth:`` in the place of ``table:`` makes one of times by size. `--from DIR` first takes over the
CSV files that `measure_performance.py --out DIR` wrote, and draws their plots.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from results import ROOT

from vizattn.bench.plot import draw
from vizattn.bench.rows import Row, read_rows
from vizattn.files import write_text

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "performance"
_TABLE = re.compile(r"(<!-- (table|growth): (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: Sequence[Row]) -> str:
    """A line for each case of ours, with the others of its comparison in the last column."""
    columns: dict[str, Callable[[Row], float | None]] = {"ms": lambda row: row.seconds and 1e3 * row.seconds}
    if rows[0].group == "data":
        columns = {"images/s": lambda row: row.images_per_second}
    columns |= {"GFLOP/s": lambda row: row.gflops, "MB": lambda row: row.run_mb}
    columns = {name: value for name, value in columns.items() if any(value(row) is not None for row in rows)}
    lines = [
        "| case | " + " | ".join(columns) + " | of the time of |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    for row in rows:
        if row.ours:
            peers = [peer for peer in rows if not peer.ours and _compared(peer) == _compared(row)]
            others = [f"{_number(row.ratio / peer.ratio)} {_case(peer)}" for peer in peers if row.ratio and peer.ratio]
            others += [f"{_case(peer)}: {peer.note}" for peer in peers if _refused(peer)]
            cells = [_number(value(row)) for value in columns.values()]
            lines.append(f"| {_case(row)} | " + " | ".join(cells) + f" | {'; '.join(others) or row.note} |")
    return "\n".join(lines) + "\n"


def growth(rows: Sequence[Row]) -> str:
    """Milliseconds and megabytes of ours by size, and how many times more of each the largest takes."""
    ours = {(row.subject, row.size): row for row in rows if row.ours and row.seconds is not None}
    subjects, sizes = (list(dict.fromkeys(keys)) for keys in zip(*ours))
    weighed = any(row.run_mb for row in ours.values())
    lines = [
        f"| {'ms (MB)' if weighed else 'ms'} | " + " | ".join(sizes) + " | times more |",
        "|---|" + "---:|" * (len(sizes) + 1),
    ]
    texts = ("{}", "({})") if weighed else ("{}",)
    for subject in subjects:
        found = [ours[subject, size] for size in sizes]
        pairs = [(1e3 * (row.seconds or 0.0), row.run_mb or 0.0) for row in found]
        cells = [" ".join(text.format(_number(x)) for text, x in zip(texts, pair)) for pair in pairs]
        more = " ".join(
            text.format(_number(last / first))
            for text, first, last in zip(texts, pairs[0], pairs[-1])
            if first and last
        )
        lines.append(f"| {subject} | " + " | ".join(cells) + f" | {more} |")
    return "\n".join(lines) + "\n"


def _case(row: Row) -> str:
    name = row.subject if row.name == "vizattn" else row.name
    usual = ("", "eager", "fp32")
    return ", ".join([name, *(word for word in (row.variant, row.dtype) if word not in usual)])


def _compared(row: Row) -> tuple[object, ...]:
    """Equal for what does the same: loading is by stages, such as ``"timm: standard, 2 workers"``."""
    stage = row.name.partition(": ")[2] if row.group == "data" else ""
    return row.subject, row.mode, row.batch, row.size, row.dtype, row.threads, stage


def _refused(peer: Row) -> bool:
    """Whether a peer is there, but does not do this."""
    return peer.seconds is None and not peer.note.endswith("is not installed")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def page(text: str, folder: Path) -> str:
    """The page with its tables written anew.

    Raises:
        ValueError: A table that no row is for.
    """

    def fill(found: re.Match[str]) -> str:
        start, kind, file, conditions, end = found.groups()
        wanted = [condition.split("=", 1) for condition in conditions.split()]
        rows = [row for row in read_rows(folder / file) if all(str(getattr(row, k)) == v for k, v in wanted)]
        if not rows:
            raise ValueError(f"{file} has no row for{conditions}.")
        return f"{start}\n{(growth if kind == 'growth' else table)(rows)}\n{end}"

    return _TABLE.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; 1 if it is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say whether the page is up to date")
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="results to take over first")
    args = parser.parse_args(argv)
    if args.source:
        for file in sorted(args.source.rglob("*.csv")):
            target = RESULTS / file.relative_to(args.source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            if target.parent == RESULTS:
                draw(read_rows(target), target.with_suffix(".svg"))
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, RESULTS)
    if args.check and new != old:
        print("docs/performance.md is not what its results say: python tools/make_performance.py")
        return 1
    if not args.check:
        write_text(PAGE, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
