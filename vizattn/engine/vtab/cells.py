"""Computes the cells of one unit, and says what came out in lines for the results file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vizattn.data.transfer import get_suite
from vizattn.engine.train import train, versions
from vizattn.engine.vtab.plan import Cell, Study, Unit
from vizattn.engine.vtab.results import Line
from vizattn.errors import VizattnError

__all__ = ["failed_lines", "run_unit"]


def run_unit(study: Study, unit: Unit, folder: Path) -> Iterator[list[Line]]:
    """Compute the cells of `unit` and give their lines, those of each computation as soon as it has ended.

    What goes wrong in a cell becomes its line, and the others go on. Bundles of final cells are in `folder`, under the
    names that their lines give, before the lines are.

    Raises:
        OSError: The disk is full: no fault of a cell, and none of the others could be kept.
    """
    from vizattn.engine.vtab.probes import run_probes

    with _scratch(folder / "running" / unit.id) as staging:
        try:
            outcomes = run_probes(study, unit, staging) if unit.probes else None
        except Exception as error:  # out of memory, damaged data, weights that cannot be had: whatever it is
            _stop_on_full_disk(error)
            yield failed_lines(study, unit, error)
            return
        if outcomes is not None:
            lines: list[Line] = []
            for cell, outcome in outcomes:
                lines += _lines(study, unit, cell, outcome, folder)
            yield lines
            return
    for cell in unit.cells:
        with _scratch(folder / "running" / cell.key) as work_dir:
            try:
                lines = _lines(study, unit, cell, _trained(study, cell, work_dir), folder)
            except Exception as error:
                _stop_on_full_disk(error)
                lines = [_failed(study, unit, cell, error)]
        yield lines


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """`path`, which is not there before, whoever was killed at it, nor afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _stop_on_full_disk(error: Exception) -> None:
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise cause


def _trained(study: Study, cell: Cell, work_dir: Path) -> dict[str, Any]:
    """One cell by the engine's own loop."""
    result = train(cell.config, work_dir=work_dir, device=study.device, quiet=True, report=False)
    metrics = result.metrics["val" if cell.stage == "select" else "test"]
    return {
        "accuracy": metrics["accuracy"],
        "samples": metrics["samples"],
        "params": result.params,
        "seconds": result.seconds,
        "peak_memory_mb": result.peak_memory_mb,
        "exported": Path(result.exported),
        "model": result.model,
        "preprocessing": result.preprocessing,
    }


def _lines(study: Study, unit: Unit, cell: Cell, outcome: dict[str, Any] | Exception, folder: Path) -> list[Line]:
    """The line of a cell, after that of the configuration it belongs to; its bundle goes where it shall stay."""
    if isinstance(outcome, Exception):
        return [_failed(study, unit, cell, outcome)]
    found = dict(outcome)
    model, preprocessing = found.pop("model"), found.pop("preprocessing")
    exported = found.pop("exported", None)
    run = _run_line(study, cell, model, preprocessing)
    line = {**_about(study, unit, cell), "status": "done", "run": run["id"], **found}
    if cell.stage == "final" and exported is not None:
        bundle = _bundle_folder(folder, unit, cell)
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        os.replace(exported, bundle)
        line["bundle"] = bundle.relative_to(folder).as_posix()
    return [run, line]


def _bundle_folder(folder: Path, unit: Unit, cell: Cell) -> Path:
    backbone = cell.config["model"]["name"].replace("/", "_").replace(":", "_")
    return folder / "bundles" / backbone / unit.method.label / unit.task.name / f"seed{cell.seed}-{cell.key[:6]}"


def _about(study: Study, unit: Unit, cell: Cell) -> Line:
    return {
        "kind": "cell",
        "cell": cell.key,
        "suite": get_suite(study.suite).name,
        "task": unit.task.name,
        "group": unit.task.group,
        "backbone": cell.config["model"]["name"],
        "method": unit.method.label,
        "row": unit.method.key,
        "adapter": unit.method.recipe.get("adapter"),
        "stage": cell.stage,
        "split": "val" if cell.stage == "select" else "test",
        "setting": cell.setting,
        "seed": cell.seed,
        "time": round(time.time(), 3),
        "host": platform.node(),
    }


def failed_lines(study: Study, unit: Unit, error: Exception) -> list[Line]:
    """The lines of a unit of which every cell failed."""
    return [_failed(study, unit, cell, error) for cell in unit.cells]


def _failed(study: Study, unit: Unit, cell: Cell, error: Exception) -> Line:
    reason = str(error) if isinstance(error, VizattnError) else f"{type(error).__name__}: {error}"
    return {**_about(study, unit, cell), "status": "failed", "reason": reason[:2000]}


def _run_line(study: Study, cell: Cell, model: nn.Module, preprocessing: Mapping[str, Any]) -> Line:
    """The configuration of cells that differ only in setting and seed, and what they were computed with."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    weights = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    config = {key: value for key, value in cell.config.items() if key != "seed"}
    content = {
        "config": _without(config, cell.setting),
        "weights": weights,
        "preprocessing": dict(preprocessing),
        "versions": versions(),
        "command": study.command,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return {"kind": "run", "id": key, **content}


def _without(config: dict[str, Any], setting: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the options that each cell sets for itself."""
    rest = json.loads(json.dumps(config))
    for name in setting:
        *path, last = name.split(".")
        here = rest
        for key in path:
            here = here[int(key)] if isinstance(here, list) else here[key]
        here.pop(int(last) if isinstance(here, list) else last, None)
    return rest
