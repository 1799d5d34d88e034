"""Measure speed and memory, beside timm, peft, natten and plain torch in the same run.

Groups: ops (attention mechanisms), backbones, adapters, startup, data (loading images). Each writes OUT/GROUP.csv and a
plot. Cases of one comparison are timed in turn, so that another load of the machine meets all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vizattn.bench import Case, Change, Row

__all__ = ["add_arguments", "run"]

_GROUPS = ("ops", "backbones", "adapters", "startup", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn bench`."""
    parser.add_argument("groups", nargs="+", choices=_GROUPS, metavar="GROUP", help=f"some of {', '.join(_GROUPS)}")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="only what has one of these in its name")
    parser.add_argument("--list", action="store_true", help="only say what would be measured")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="these backbones; for adapters, what they attach to")
    parser.add_argument("--mode", nargs="+", choices=("forward", "train"), help="default: both; adapters: train")
    parser.add_argument("--batch", nargs="+", type=_positive, metavar="N")
    parser.add_argument("--size", nargs="+", type=_size, metavar="N|HxW", help="tokens for ops, else pixels")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "amp"), help="amp: fp32 under bf16 autocast")
    parser.add_argument(
        "--variant",
        nargs="+",
        metavar="V",
        help="ways to run: eager (the default), compile, channels_last, fuse, or several as in fuse+channels_last",
    )
    parser.add_argument("--heads", type=_positive, default=4, help="of ops (default 4)")
    parser.add_argument("--dim", type=_positive, default=32, help="channels a head, of ops (default 32)")
    parser.add_argument("--rounds", type=_positive, default=5, help="how often each case is timed (default 5)")
    parser.add_argument("--least-seconds", type=_seconds, default=0.02, help="length of one timing (default 0.02)")
    parser.add_argument("--threads", type=_positive, default=1, help="default 1")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory, which takes a process a case")
    parser.add_argument("--out", default="work_dirs/bench", metavar="DIR", help="default: work_dirs/bench")
    parser.add_argument("--against", metavar="CSV", help="compare with this older result: status 1 if ours is slower")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write: 0 all done, 1 something of ours failed or became slower."""
    import tempfile
    from pathlib import Path

    from vizattn.bench import Options, cases_of, read_rows
    from vizattn.bench.rows import context_here
    from vizattn.files import explain_disk_errors, prepare_folder

    from .text import columns

    old = read_rows(Path(args.against)) if args.against else []
    out = Path(args.out)
    with tempfile.TemporaryDirectory(prefix="vizattn-bench-") as folder:
        options = Options(
            modes=args.mode and tuple(args.mode),
            batches=args.batch and tuple(args.batch),
            sizes=args.size and tuple(args.size),
            dtypes=tuple(args.dtype or ("fp32",)),
            variants=tuple(args.variant or ("eager",)),
            models=args.model and tuple(args.model),
            heads=args.heads,
            dim=args.dim,
            folder=Path(folder),
        )
        planned = {group: cases_of(group, options, args.only) for group in args.groups}
        if args.list:
            print(columns([_plan(case) for cases in planned.values() for case in cases]))
            return 0
        if args.against:
            _check_shared([case for cases in planned.values() for case in cases], old, args)
        with explain_disk_errors(out, "choose another folder with --out"):
            prepare_folder(out)
            context = context_here(_command(args))
            return max([_group(group, cases, args, context, old) for group, cases in planned.items()])


def _check_shared(cases: Sequence[Case], old: Sequence[Row], args: argparse.Namespace) -> None:
    """Before hours of measuring: is there something of ours in each group to compare?"""
    from vizattn.errors import VizattnError

    for group in args.groups:
        asked = {(*case.comparison, case.name, case.variant, args.threads) for case in cases if case.ours}
        measured = {
            (row.group, row.subject, row.mode, str(row.batch), row.size, row.dtype, row.name, row.variant, row.threads)
            for row in old
        }
        if not any(case[0] == group for case in asked & measured):
            raise VizattnError(
                f"{args.against} has no case of ours in common with this run of {group}: take the options in its "
                "column `command`; --list shows what would be measured."
            )


def _group(
    group: str, cases: Sequence[Case], args: argparse.Namespace, context: dict[str, str], old: Sequence[Row]
) -> int:
    """Measure, write and compare one group; its status."""
    from pathlib import Path

    from vizattn.bench import GROUPS, compare, draw, measure, write_rows

    from .text import columns

    table = Path(args.out) / f"{group}.csv"
    rows: list[Row] = []
    print(f"{group}: {GROUPS[group].about}", flush=True)
    for measured in measure(
        cases,
        rounds=args.rounds,
        threads=args.threads,
        least_seconds=args.least_seconds,
        memory=not args.no_memory,
        context=context,
    ):
        notes = [f"  {row.name}: {row.note}" for row in measured if row.note]
        print("\n".join(["", _title(measured[0]), columns([_shown(row) for row in measured]), *notes]), flush=True)
        rows += measured
        write_rows(rows, table)  # after each comparison: an interruption leaves what is done
    draw(rows, table.with_suffix(".svg"))
    print(f"\nWritten: {table} and {table.with_suffix('.svg').name}")
    status = int(any(row.ours and row.note for row in rows))
    if old:
        changes = compare([row for row in rows if row.ours], [row for row in old if row.group == group])
        print(f"\nAgainst {args.against}:\n{columns([_change(change) for change in changes])}")
        status = max(status, int(any(change.verdict == "slower" for change in changes)))
    return status


def _title(row: Row) -> str:
    parts = (row.subject, row.mode, row.batch and f"batch {row.batch}", row.size, row.dtype, f"{row.threads} threads")
    return ", ".join(part for part in parts if part)


def _plan(case: Case) -> dict[str, object]:
    group, subject, mode, batch, size, dtype = case.comparison
    where = {"group": group, "subject": subject, "mode": mode, "batch": batch, "size": size, "dtype": dtype}
    return {**where, "case": case.name, "variant": case.variant}


def _shown(row: Row) -> dict[str, object]:
    """The columns that fit into a terminal."""
    spread = None if row.ratio_low is None else f"{row.ratio_low:.3g} to {row.ratio_high:.3g}"
    shown: dict[str, object] = {
        "case": row.name if row.variant == "eager" else f"{row.name}, {row.variant}",
        "ms": row.seconds and 1e3 * row.seconds,
        f"of {row.reference}": row.ratio,
        "quartiles": spread,
    }
    if row.gmacs is not None or row.peak_gflops is not None:
        share = row.gflops and row.peak_gflops and 100 * row.gflops / row.peak_gflops
        shown |= {"GMACs": row.gmacs, "GFLOP/s": row.gflops, "% of peak": share}
        shown |= {"run MB": row.run_mb, "built MB": row.built_mb}
    else:
        shown |= {"images/s": row.images_per_second}
    return shown


def _change(change: Change) -> dict[str, object]:
    row = change.row
    return {
        "case": ", ".join(filter(None, [row.subject, row.name, row.mode, row.size, row.dtype, row.variant])),
        "in": change.unit,
        "before": change.before,
        "now": change.now,
        "MB before": change.memory_before,
        "MB now": row.run_mb,
        "verdict": change.verdict,
    }


def _command(args: argparse.Namespace) -> str:
    """The command that measures this again."""
    import shlex

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["vizattn", "bench", *args.groups]
    for name, value in vars(args).items():
        if name in ("debug", "groups", "out", "against", "list") or value == parser.get_default(name):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        texts = ["x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
        words += [f"--{name.replace('_', '-')}", *texts]
    return shlex.join(words)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """``"56"`` -> (56, 56); ``"56x40"`` -> (56, 40)."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HxW, whole numbers of at least 1")
    return int(sides[0]), int(sides[-1])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return seconds
