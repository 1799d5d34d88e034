"""Adapt a small backbone, pretrained on letters, to handwritten digits by six methods and a control; no network."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vizattn demo`."""
    parser.add_argument("--work-dir", default="work_dirs/demo", metavar="DIR", help="default: work_dirs/demo")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method (default: 3)")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these (default: all seven, listed in the table)"
    )


def run(args: argparse.Namespace) -> int:
    """Train, show the table, write the files, load the bundles again."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from vizattn.engine.demo import HEADER, METHODS, check_bundles, run_demo, table_rows, write_results
    from vizattn.errors import VizattnError, unknown

    methods = args.methods or list(METHODS)
    for name in methods:
        if name not in METHODS:
            raise unknown("method of the demo:", name, METHODS)
    if args.seeds < 1:
        raise VizattnError(f"--seeds must be at least 1, got {args.seeds}.")
    folder, seeds, start = Path(args.work_dir), list(range(args.seeds)), time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # the table in a log

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        whole = bars.add_task("all runs", total=len(methods) * len(seeds))
        now = bars.add_task("starting", total=None)
        seen: list[tuple[str, int]] = []

        def show(method: str, seed: int, done: int, total: int) -> None:
            if (method, seed) not in seen:
                seen.append((method, seed))
                bars.reset(now)
                bars.update(whole, completed=len(seen) - 1)
                if not console.is_terminal:
                    console.print(f"{method}, seed {seed}")
            bars.update(now, description=f"{method}, seed {seed}", completed=done, total=total)

        logging.getLogger("vizattn").setLevel(logging.ERROR)  # each run would say that its head is new
        rows = run_demo(folder, seeds, methods, show)
        bars.update(whole, completed=len(methods) * len(seeds))
        bars.update(now, visible=False)

    table = Table(title=f"scikit-learn digits, test, {len(seeds)} seeds")
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("method", "note") else "right")
    for cells in table_rows(rows):
        table.add_row(*cells)
    console.print(table)
    write_results(folder, rows, seeds)
    console.print("Loading every bundle in a fresh process ...")
    pairs = check_bundles(folder, methods)
    console.print(f"All {len(pairs)} bundles reproduce their test accuracy exactly.")
    console.print(
        f"Written in {time.perf_counter() - start:.0f} s to {folder}: results.csv, accuracy.png, report.html,"
    )
    console.print(f"and a bundle for each method ({', '.join(methods)}).")
    return 0
