"""Measure how well backbones transfer with adapters: VTAB-1k and suites like it."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

_EPILOG = """\
examples:
  vizattn vtab run --suite vtab-mini --backbone vit_va_nano_patch4_32 --adapter linear_probe vpt
  vizattn vtab run --adapter vpt --root DATA --backbone vit_base_patch16_224.augreg_in21k --workers 4
  vizattn vtab report work_dirs/vtab
  vizattn vtab check --root DATA
  vizattn vtab prepare dsprites_loc --root DATA
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vizattn vtab` and its four parts."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True, metavar="run|report|check|prepare")
    _add_run(parts.add_parser("run", help="train and measure every cell that has no result yet", allow_abbrev=False))
    report = parts.add_parser("report", help="tables and plots of what was measured", allow_abbrev=False)
    report.add_argument("folder", nargs="?", default="work_dirs/vtab", help="of the results (default: %(default)s)")
    report.add_argument("--suite", metavar="NAME", help="one of several suites in the results")
    report.add_argument("--to", metavar="DIR", help="where the report goes (default: beside the results)")
    check = parts.add_parser("check", help="look at a tree of tasks before anything is trained", allow_abbrev=False)
    _add_suite(check)
    check.add_argument("--no-decode", action="store_true", help="look at lists and files, and decode no image")
    prepare = parts.add_parser("prepare", help="build a task's folder from its source", allow_abbrev=False)
    prepare.add_argument("task", help="a task of VTAB-1k")
    prepare.add_argument("--root", required=True, metavar="DIR", help="where the task's folder goes")
    prepare.add_argument("--source", metavar="DIR", help="the downloaded source, where it is here already")


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", default="vtab-1k", help="vtab-1k (default), vtab-mini, vtab-mini-skimage, fgvc, or a JSON file"
    )
    parser.add_argument("--tasks", default="all", metavar="NAME,...", help="tasks or groups (default: all)")
    parser.add_argument("--root", metavar="DIR", help="the folder with the tasks' folders")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", nargs="+", metavar="METHOD", required=True, help="adapters, or recipes such as vtab/vpt"
    )
    parser.add_argument(
        "--backbone", nargs="+", metavar="NAME", default=[None], help="timm names (default: the recipe's)"
    )
    _add_suite(parser)
    parser.add_argument("--seeds", default="5", metavar="N|LIST", help="final runs: how many, or which as in 42,44")
    parser.add_argument("--sweep-seeds", default="1", metavar="N|LIST", help="runs of each setting that is compared")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=V,V,...",
        help="settings to compare, as in lr=0.001,0.01 weight_decay=0,1e-4; or none (default: the recipe's)",
    )
    parser.add_argument(
        "--out", default="work_dirs/vtab", metavar="DIR", help="results, bundles (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--ray", metavar="ADDRESS", help='a Ray cluster, or "local" for one on this machine')
    parser.add_argument("--no-cache", action="store_true", help="compute frozen features anew at every step")
    parser.add_argument("--retry-failed", action="store_true", help="compute cells again that failed before")
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of every recipe, as in schedule.epochs=20 adapter.num_tokens=10",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the table")


def run(args: argparse.Namespace) -> int:
    """Do the part that was asked for."""
    return {"run": _run, "report": _report, "check": _check, "prepare": _prepare}[args.part](args)


def _seeds(text: str, option: str) -> list[int]:
    from vizattn.engine.vtab.plan import PUBLISHED_SEEDS
    from vizattn.errors import VizattnError

    listed = "," in text
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or (numbers == [0] and not listed) or len(set(numbers)) < len(numbers):
        raise VizattnError(
            f"{option} takes how many, as in 5, or a list of different seeds, as in 42,44 or 7,; not {text!r}."
        )
    if listed:
        return numbers
    further = (seed for seed in range(10_000) if seed not in PUBLISHED_SEEDS)
    return [*PUBLISHED_SEEDS, *(next(further) for _ in range(max(0, numbers[0] - 5)))][: numbers[0]]


def _failures(folder: Path) -> frozenset[tuple[str, float]]:
    """Cells that failed so far, and when."""
    from vizattn.engine.vtab.results import Results

    results = Results(folder)
    results.read()
    return frozenset((line["cell"], line["time"]) for line in results.cells() if line["status"] == "failed")


def study_of(args: argparse.Namespace) -> tuple[Any, dict[str, str]]:
    """The study that the arguments of `vtab run` describe, and why tasks were left out of it."""
    from vizattn.data.transfer import available, get_suite, select_tasks
    from vizattn.engine.build import choose_device
    from vizattn.engine.config import parse_overrides
    from vizattn.engine.models import check_model
    from vizattn.engine.vtab.plan import Study, cell_of, load_method
    from vizattn.errors import VizattnError

    suite = get_suite(args.suite)
    tasks = select_tasks(suite, args.tasks)
    root = str(Path(args.root).resolve()) if args.root else None
    absent = {task.name: str(found) for task in tasks if not (found := available(suite, task, root))}
    tasks = [task for task in tasks if task.name not in absent]
    if not tasks:
        raise VizattnError("None of the tasks is here:\n" + "\n".join(f"  {k}: {v}" for k, v in absent.items()))
    overrides = parse_overrides(args.cfg_options)
    methods = [
        load_method(name, backbone=backbone, suite=suite.name, overrides=overrides, sweep=args.sweep)
        for backbone in args.backbone
        for name in args.adapter
    ]
    study = Study(
        suite=args.suite,
        root=root,
        tasks=tasks,
        methods=methods,
        seeds=_seeds(args.seeds, "--seeds"),
        sweep_seeds=_seeds(args.sweep_seeds, "--sweep-seeds"),
        device=args.device,
        cached=not args.no_cache,
        retry=_failures(Path(args.out)) if args.retry_failed else frozenset(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    for method in methods:  # a mistake in an option shows here, before anything is computed
        for setting in method.grid:
            check_model(cell_of(study, method, tasks[0], "final", setting, 0).config)
    if args.ray is None:
        choose_device(args.device)
    return study, absent


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vizattn.data.transfer import get_suite
    from vizattn.engine.vtab.plan import all_measured, total
    from vizattn.engine.vtab.results import Results
    from vizattn.engine.vtab.runner import run_study
    from vizattn.errors import VizattnError

    if args.workers < 1:
        raise VizattnError(f"--workers must be at least 1, not {args.workers}.")
    study, absent = study_of(args)
    console = Console(highlight=False, quiet=args.quiet)
    for name, reason in absent.items():
        console.print(f"without {name}: {reason}", markup=False, soft_wrap=True)
    folder = Path(args.out)
    count = total(study)
    settings = sum(len(method.grid) for method in study.methods)
    console.print(
        f"Tasks: {len(study.tasks)}, methods: {len(study.methods)}, settings: {settings}, cells: {count}; "
        f"results in {folder / 'results.jsonl'}",
        soft_wrap=True,
    )
    if args.dry_run:
        return 0
    _watch(study, folder, count, args, console, run_study)
    results = Results(folder)
    results.read()
    failed = [line for line in results.cells() if line["status"] == "failed" and _place(line) in _places(study)]
    for line in failed[-5:]:
        place = f"{line['task']}, {line['method']}, {line['stage']}, seed {line['seed']}, {line['setting']}"
        console.print(f"failed: {place}: {line['reason']}", markup=False, soft_wrap=True)
    if len(failed) > 5:
        console.print(f"{len(failed)} cells failed in all; their reasons are in {results.path}")
    for root in sorted(_roots(study, results) - {study.root, None}):
        text = f"Some of these results are of the images in {root}; for those in {study.root} choose another --out."
        console.print(text, markup=False, soft_wrap=True)
    _show(results, get_suite(args.suite), folder)
    return 0 if all_measured(study, results) else 1


def _place(line: dict[str, Any]) -> tuple[str, str]:
    return line["task"], line["row"]


def _places(study: Any) -> set[tuple[str, str]]:
    """(task, row of the tables) of all that a study measures."""
    return {(task.name, method.key) for task in study.tasks for method in study.methods}


def _roots(study: Any, results: Any) -> set[Any]:
    """The folders of images that the results of a study were measured on."""
    runs = {line["run"] for line in results.cells() if "run" in line and _place(line) in _places(study)}
    return {run["config"]["data"]["root"] for run in map(results.run, runs) if run is not None}


def _watch(study: Any, folder: Path, count: int, args: argparse.Namespace, console: Any, run_study: Any) -> None:
    """Run, with a bar over the cells of this study; each warning is shown once, however many cells it is about."""
    import logging
    import warnings

    from vizattn.engine.vtab.results import Results

    names, earlier = _places(study), Results(folder)
    earlier.read()
    seen = {line["cell"] for line in earlier.cells() if _place(line) in names}
    warned: set[str] = set()
    plain = warnings.showwarning

    def warn_once(message: Warning | str, *place: Any, **kwargs: Any) -> None:
        if str(message) not in warned:
            warned.add(str(message))
            plain(message, *place, **kwargs)

    logging.getLogger("vizattn").setLevel(logging.ERROR)  # each model would say that its head is new
    with _bar(console) as bar, warnings.catch_warnings():
        warnings.showwarning = warn_once
        whole = bar.add_task("cells", total=count, completed=min(len(seen), count))

        def report(lines: list[dict[str, Any]]) -> None:
            for line in lines:
                if _place(line) in names:
                    seen.add(line["cell"])
                    bar.update(whole, completed=min(len(seen), count), description=f"{line['task']}, {line['method']}")
                    if not console.is_terminal and line["stage"] == "final":
                        result = f"{line['accuracy']:.2%}" if line["status"] == "done" else f"failed: {line['reason']}"
                        text = f"{line['task']}, {line['method']}, seed {line['seed']}: {result}"
                        console.print(text, markup=False, soft_wrap=True)

        try:
            run_study(study, folder, workers=args.workers, ray=args.ray, report=report)
        except KeyboardInterrupt:
            console.print("Interrupted. The same command goes on.")
            raise SystemExit(130) from None
        bar.update(whole, completed=count, description="all cells have ended")


def _show(results: Any, suite: Any, to: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from vizattn.engine.vtab.report import summary_table, task_table, write_reports
    from vizattn.engine.vtab.tables import rows_of

    paths = write_reports(results, suite, to)
    rows = rows_of(results.cells(), suite)
    console = Console(highlight=False) if Console().is_terminal else Console(width=140, highlight=False)
    tables = [(f"{suite.name}: test accuracy, %", summary_table(rows, suite))]
    if len(rows) < 5:
        tables.append(("by task, with standard deviation (and number) of seeds", task_table(rows, suite)))
    for title, (header, body) in tables:
        table = Table(title=title)
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place < 2 else "right")
        for cells in body:
            table.add_row(*cells)
        console.print(table)
    if results.torn:
        console.print(f"{results.torn} lines of {results.path} cannot be read and were left out.")
    console.print("Report: " + ", ".join(map(str, paths)), soft_wrap=True)


def _report(args: argparse.Namespace) -> int:
    from vizattn.data.transfer import SUITES, Suite, get_suite
    from vizattn.engine.vtab.results import Results
    from vizattn.errors import VizattnError, unknown

    results = Results(args.folder)
    if not results.path.is_file():
        raise VizattnError(f"There are no results in {args.folder}: vizattn vtab run writes {results.path}.")
    results.read()
    found = list(dict.fromkeys(line["suite"] for line in results.cells()))
    if not found:
        raise VizattnError(f"{results.path} has no finished cell yet.")
    wanted = get_suite(args.suite).name if args.suite else found[0]
    if wanted not in found:
        raise unknown(f"suite in {results.path}", wanted, found)
    if not args.suite and len(found) > 1:
        raise VizattnError(f"{results.path} has several suites: choose with --suite {' or '.join(found)}.")
    suite = get_suite(args.suite) if args.suite else SUITES.get(wanted)
    if not isinstance(suite, Suite):
        raise VizattnError(f"The suite {wanted} is a user's own: give its JSON file with --suite FILE.")
    _show(results, suite, Path(args.to or args.folder))
    return 0


def _check(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vizattn.data.transfer import check, render

    with _bar() as bar:
        found = check(args.suite, args.root, args.tasks, decode=not args.no_decode, progress=_shown(bar))
    console = Console(highlight=False) if Console().is_terminal else Console(width=140, highlight=False)
    console.print(render(found))
    asked = args.tasks.split(",")  # a task that is not there is a mistake where it was named
    return 1 if any(task.errors or (task.missing and task.task in asked) for task in found) else 0


def _prepare(args: argparse.Namespace) -> int:
    from vizattn.data.transfer import prepare

    with _bar() as bar:
        folder = prepare(args.task, args.root, args.source, progress=_shown(bar))
    print(f"{args.task} is in {folder}. Next: vizattn vtab check --root {args.root} --tasks {args.task}")
    return 0


def _bar(console: Any = None) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=console is None)


def _shown(bar: Any) -> Any:
    """Progress of named things on a bar each."""
    lines: dict[str, Any] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in lines:
            lines[name] = bar.add_task(name, total=total)
        bar.update(lines[name], completed=done, total=total)

    return show
