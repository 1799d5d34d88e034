"""Does real damage to the real command line, and counts: see `make faults`.

Every case runs commands in processes of their own, with small models and drawn data. A row of the table is a case:
"tried" counts faults, "lost" those after which something was lost, hung, or ended in a traceback. The same seed does
the same damage, but for the moments that a clock chooses.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from faults.campaign import Tally, run_campaign, write_json
from faults.table import all_cases


def main() -> int:
    """Run the campaign; the status is 1 where anything was lost."""
    parser = argparse.ArgumentParser("make faults ARGS=...", description=__doc__)
    parser.add_argument("--seed", type=int, help="of all damage (default: another every time)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of each case (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="KIND[/CASE]", default=[], help="these kinds, or cases that begin so"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at once (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of rounds that lost something")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/faults.json"), help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="list the cases, and try none")
    args = parser.parse_args()
    cases = [case for case in all_cases() if not args.only or f"{case.kind}/{case.name}".startswith(tuple(args.only))]
    if not cases:
        parser.error(f"there is no case {' '.join(args.only)}; see --list")
    if args.list:
        print(*(f"{case.kind}/{case.name}" for case in cases), sep="\n")
        return 0
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    console, start = Console(), time.monotonic()
    console.print(f"{len(cases)} cases, {args.rounds} rounds, seed {seed}")

    def report(found: Tally) -> None:
        console.print(f"{found.kind}/{found.name}: {found.tried} tried, {len(found.lost)} lost, {found.seconds:.0f} s")
        for lost in found.lost:
            console.print(f"  LOST {lost}", style="red", markup=False, highlight=False)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # disks are unmounted, and folders removed
    tallies = run_campaign(cases, seed=seed, rounds=args.rounds, jobs=args.jobs, keep=args.keep, report=report)
    seconds = round(time.monotonic() - start)
    console.print(_table(tallies, seed, seconds))
    write_json(tallies, args.out, seed=seed, rounds=args.rounds, seconds=seconds)
    console.print(f"Written to {args.out}")
    return 1 if any(tally.lost for tally in tallies) else 0


def _table(tallies: list[Tally], seed: int, seconds: int) -> Table:
    table = Table(title=f"Faults, seed {seed}, {seconds} s", title_justify="left")
    table.add_column("kind")
    table.add_column("case")
    for name in ("tried", "lost", "seconds"):
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(tally.kind for tally in tallies):
        rows = [tally for tally in tallies if tally.kind == kind]
        for tally in rows:
            table.add_row(kind, tally.name, f"{tally.tried:,}", f"{len(tally.lost):,}", f"{tally.seconds:.0f}")
        tried, lost = sum(tally.tried for tally in rows), sum(len(tally.lost) for tally in rows)
        style = "bold red" if lost else "bold"
        table.add_row(kind, "together", f"{tried:,}", f"{lost:,}", "", style=style, end_section=True)
    return table


if __name__ == "__main__":
    sys.exit(main())
