"""A study on a Ray cluster: this process deals out units and writes what comes back. Needs vizattn[ray]."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vizattn.engine.vtab.plan import Study, Unit, finished, ready
from vizattn.engine.vtab.results import Line, Results
from vizattn.errors import VizattnError

__all__ = ["run_on_ray"]

_PAUSE = 0.5


def run_on_ray(study: Study, results: Results, address: str, report: Callable[[list[Line]], None]) -> None:
    """Compute the study's cells as tasks of one CPU each on the cluster at `address`, or on a new one here ("local").

    The images must lie under the same path on every machine; bundles come back through Ray.

    Raises:
        VizattnError: Ray is not installed, or there is no cluster at `address`.
    """
    try:
        import ray
    except ImportError as error:
        raise VizattnError('Ray is not installed. Install it with: pip install "vizattn[ray]"') from error
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # of many kinds
        raise VizattnError(f"There is no Ray cluster at {address!r}: {error}") from error
    try:
        _deal(study, results, report, ray)
    finally:
        ray.shutdown()


def _deal(study: Study, results: Results, report: Callable[[list[Line]], None], ray: Any) -> None:
    remote = ray.remote(num_cpus=1, max_retries=1)(_unit_elsewhere)
    slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, tuple[Unit, ExitStack]] = {}
    try:
        while True:
            report(results.read())
            if not running and finished(study, results):
                return
            held = {unit.id for unit, _ in running.values()}
            for unit in ready(study, results):
                if len(running) >= slots:
                    break
                if unit.id in held:
                    continue
                stack = ExitStack()
                if stack.enter_context(results.claim(unit.id)):
                    running[remote.remote(study, unit)] = (unit, stack)
                else:
                    stack.close()
            done, _ = ray.wait([*running], timeout=_PAUSE) if running else ([], [])
            for reference in done:
                unit, stack = running.pop(reference)
                with stack:
                    results.append(_collect(study, unit, reference, results.folder, ray))
    finally:
        for _, stack in running.values():
            stack.close()


def _collect(study: Study, unit: Unit, reference: Any, folder: Path, ray: Any) -> list[Line]:
    from vizattn.engine.vtab.cells import failed_lines

    try:
        lines, files = ray.get(reference)
    except Exception as error:  # the machine went away, or what Ray makes of an exception there
        return failed_lines(study, unit, VizattnError(f"It ended on the cluster with {type(error).__name__}: {error}"))
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return lines


def _unit_elsewhere(study: Study, unit: Unit) -> tuple[list[Line], dict[str, bytes]]:
    """On a machine of the cluster: the lines of a unit, and the files of its bundles."""
    import torch

    import vizattn  # noqa: F401  (registers the backbones)
    from vizattn.engine.vtab.cells import run_unit

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lines = [line for part in run_unit(study, unit, Path(scratch)) for line in part]
        bundles = Path(scratch, "bundles")
        files = {
            path.relative_to(scratch).as_posix(): path.read_bytes() for path in bundles.rglob("*") if path.is_file()
        }
    return lines, files
