"""Runs a study: in this process, in several on this machine, or on a Ray cluster; all share the results file.

A unit is held by a lock while it is computed, so two runners on one folder divide the work between them, and one that
is killed leaves nothing behind but the unit it was at.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from vizattn.engine.vtab.plan import Study, Unit, finished, ready
from vizattn.engine.vtab.results import Line, Results
from vizattn.errors import VizattnError
from vizattn.files import explain_disk_errors, prepare_folder

__all__ = ["Report", "run_study"]

Report = Callable[[list[Line]], None]
"""Called with the lines that are new in the results file, whoever wrote them."""

_PAUSE = 0.5
_DEATHS = 2
"""A unit at which so many processes died is given up."""


def run_study(
    study: Study, folder: Path, *, workers: int = 1, ray: str | None = None, report: Report | None = None
) -> None:
    """Compute every cell that has no line in ``folder/results.jsonl`` yet, and return when all have one.

    Args:
        study: What to compute.
        folder: Where results and bundles go; on a Ray cluster a folder of this machine.
        workers: Processes on this machine. With one, the work is done here.
        ray: Address of a Ray cluster ("local" for one on this machine), which then does the work.
        report: See `Report`.

    Raises:
        VizattnError: A disk that cannot be written, a results file of a newer version, or no Ray.
    """
    report = report or (lambda lines: None)
    with explain_disk_errors(folder, "choose another folder with --out"):
        prepare_folder(folder)
        results = Results(folder)
        results.read()
        if ray is not None:
            from vizattn.engine.vtab.cluster import run_on_ray

            run_on_ray(study, results, ray, report)
        elif workers == 1:
            for unit in _units(study, results, report):
                _compute(study, unit, results)
        else:
            _run_workers(study, results, workers, report)
        report(results.read())
        with contextlib.suppress(OSError):  # other studies may be at work in it
            (folder / "running").rmdir()


def _units(study: Study, results: Results, report: Report) -> Iterator[Unit]:
    """Units to compute here, each held by this process; ends when nothing is left to anyone."""
    while True:
        report(results.read())
        for unit in ready(study, results):
            with results.claim(unit.id) as held:
                if not held:
                    continue
                report(results.read())
                now = next((u for u in ready(study, results) if u.id == unit.id), None)
                if now is not None:  # nobody has done it meanwhile
                    yield now
                    break
        else:
            if finished(study, results):
                return
            time.sleep(_PAUSE)  # others are at what is left


def _compute(study: Study, unit: Unit, results: Results) -> None:
    from vizattn.engine.vtab.cells import run_unit

    for lines in run_unit(study, unit, results.folder):
        results.append(lines)


def _run_workers(study: Study, results: Results, workers: int, report: Report) -> None:
    """Processes that each do what a single one would do; one that dies is replaced."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    deaths: Counter[str | None] = Counter()
    running: dict[Any, Any] = {}  # by the end of each worker's own pipe: what a killed one holds blocks no other
    at: dict[Any, str] = {}

    def start() -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(study, str(results.folder), threads, theirs), daemon=True)
        process.start()
        theirs.close()
        running[ours] = process

    try:
        for _ in range(workers):
            start()
        while running:
            ready_pipes: list[Any] = wait([*running], timeout=_PAUSE)
            for pipe in ready_pipes:
                told = None
                with contextlib.suppress(EOFError, OSError):
                    told = pipe.recv()
                if isinstance(told, Exception):
                    raise told
                if told is not None:
                    at[pipe] = told
                    continue
                process, unit = running.pop(pipe), at.pop(pipe, None)
                process.join()
                if process.exitcode == 0:
                    continue
                deaths[unit] += 1
                if deaths[unit] >= _DEATHS:
                    if unit is None:
                        raise VizattnError(f"Workers end with {_ending(process.exitcode)} before they have any work.")
                    _give_up(study, unit, results, _ending(process.exitcode))
                start()
            report(results.read())
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _ending(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    name = signal.Signals(-code).name
    return f"{name}{' (killed, perhaps for want of memory)' if name == 'SIGKILL' else ''}"


def _give_up(study: Study, unit_id: str, results: Results, ending: str) -> None:
    from vizattn.engine.vtab.cells import failed_lines

    results.read()
    unit = next((unit for unit in ready(study, results) if unit.id == unit_id), None)
    if unit is not None:
        error = VizattnError(f"{_DEATHS} processes that computed it died, the last by {ending}.")
        results.append(failed_lines(study, unit, error))


def _work(study: Study, folder: str, threads: int, parent: Any) -> None:
    """One worker: units until nothing is left, each told to the parent, as is what ends the study."""
    import torch

    import vizattn  # noqa: F401  (registers the backbones)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    torch.set_num_threads(threads)
    results = Results(folder)
    try:
        for unit in _units(study, results, lambda lines: None):
            parent.send(unit.id)
            _compute(study, unit, results)
    except (OSError, VizattnError) as error:  # a full disk: nobody can go on
        parent.send(error)
