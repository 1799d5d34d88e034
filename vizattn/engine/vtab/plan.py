"""What a transfer study computes: its cells, in which order, and how hyper-parameters are chosen.

A cell is one training: (suite, task, recipe with its hyper-parameters, seed). It is either to *select* (train on 800
images, measure on 200) or *final* (train on all 1,000 by the chosen hyper-parameters, measure the last epoch on test).
Nothing here looks at a test result, and final cells exist only once every cell of the selection has ended.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vizattn.adapters import METHODS
from vizattn.data.transfer import TransferTask, get_suite
from vizattn.engine.config import apply_overrides, parse_overrides, resolve_config
from vizattn.engine.recipes import find_recipe, load_recipe, recipe_name
from vizattn.engine.vtab.results import Line, Results
from vizattn.errors import VizattnError, unknown

__all__ = [
    "PUBLISHED_SEEDS",
    "Cell",
    "Method",
    "Study",
    "Unit",
    "all_measured",
    "load_method",
    "parse_sweep",
    "ready",
    "selected",
    "total",
]

PUBLISHED_SEEDS = (42, 44, 82, 100, 800)
"""Of VPT, arXiv:2203.12119."""

Setting = dict[str, Any]
"""Hyper-parameters by their dotted names, as in {"optimizer.lr": 0.1}."""

_SHORT = {"lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay"}
_FROZEN = ("linear_probe", "efficient_probing")
_RATES = ("optimizer.lr", "optimizer.weight_decay")
_BOOKKEEPING = ("logging", "checkpoint", "validation", "cache_features", "sweep", "compile")
_WHERE = ("root", "num_workers", "in_memory")


@dataclass(frozen=True)
class Method:
    """One row of the tables: a backbone with an adapter, its recipe, and the settings to choose from."""

    label: str
    recipe: dict[str, Any]
    grid: list[Setting]

    @property
    def key(self) -> str:
        """Equal for equal recipes: results of other recipes are other rows of the tables."""
        return _hash([self.label, {key: value for key, value in self.recipe.items() if key not in _BOOKKEEPING}])


@dataclass(frozen=True)
class Study:
    """Everything that a runner needs to know; plain values, so that processes can be sent it."""

    suite: str
    """Its name, or the JSON file of a user's own."""
    root: str | None
    tasks: list[TransferTask]
    methods: list[Method]
    seeds: list[int]
    sweep_seeds: list[int]
    device: str | None = None
    cached: bool = True
    retry: frozenset[tuple[str, float]] = frozenset()
    """Cells that are computed again although they failed, each with the time that its line gives to the failure.

    Not all from before a certain time, since a clock may be set back.
    """
    command: str = ""
    _cells: dict[Any, Cell] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Cell:
    """One training; `config` is its resolved recipe, `key` the hash of all of it that a result depends on."""

    key: str
    stage: str
    setting: Setting
    seed: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Cells that one process computes together."""

    id: str
    task: TransferTask
    method: Method
    cells: tuple[Cell, ...]
    probes: bool
    """Whether they read the same frozen features."""


def load_method(
    name: str, *, backbone: str | None, suite: str, overrides: Mapping[str, Any], sweep: Sequence[str] | None
) -> Method:
    """A method by the name of an adapter, or of a recipe.

    Args:
        name: An adapter such as "vpt", which takes the recipe of that name for the suite, or a recipe.
        backbone: A timm name, in the place of the recipe's.
        suite: Name of the suite; "vtab-mini" and what begins so have recipes of their own.
        overrides: Dotted options on top of the recipe.
        sweep: As `parse_sweep` takes it; None for the recipe's own grid.

    Raises:
        VizattnError: There is no such adapter or recipe, or a wrong option.
    """
    packaged = f"vtab/mini_{name}" if suite.startswith("vtab-mini") else f"vtab/{name}"
    try:
        path = find_recipe(packaged)
    except VizattnError:
        if "/" not in name and name not in METHODS and not Path(name).suffix:
            raise unknown("adapter", name, METHODS, "vizattn list --adapters") from None
        path = find_recipe(name)
    recipe = load_recipe(path)
    grid = recipe.pop("sweep", None) or {}
    chosen = dict(overrides)
    if backbone is not None:
        chosen["model.name"] = backbone
    recipe = apply_overrides(recipe, chosen)
    if sweep is not None:
        grid = parse_sweep(sweep)
    grid = {key: values for key, values in grid.items() if key not in overrides}
    label = recipe_name(path).removeprefix("mini_")
    settings = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return Method(label, recipe, settings)


def parse_sweep(items: Sequence[str]) -> dict[str, list[Any]]:
    """``["lr=1e-3,1e-2", "adapter.num_tokens=1,10"]`` as dotted options with their values; ``["none"]`` as nothing.

    Raises:
        VizattnError: An item is not NAME=VALUE,VALUE,... or names an option twice.
    """
    if [*items] == ["none"]:
        return {}
    grid: dict[str, list[Any]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        values = [value for value in text.split(",") if value.strip()]
        if not equals or not values:
            raise VizattnError(f"--sweep takes NAME=VALUE,VALUE,... as in lr=0.001,0.01 (or none), not {item!r}.")
        name = _SHORT.get(name.strip(), name.strip())
        if name in grid:
            raise VizattnError(f"--sweep names {name} twice.")
        grid[name] = list(dict.fromkeys(parse_overrides([f"{name}={value}"])[name] for value in values))
    return grid


def cell_of(study: Study, method: Method, task: TransferTask, stage: str, setting: Setting, seed: int) -> Cell:
    """The cell with its resolved recipe.

    Raises:
        VizattnError: A wrong option.
    """
    place = (method.key, task.name, stage, _hash(setting), seed)
    if place not in study._cells:
        study._cells[place] = _new_cell(study, method, task, stage, setting, seed)
    return study._cells[place]


def _new_cell(study: Study, method: Method, task: TransferTask, stage: str, setting: Setting, seed: int) -> Cell:
    data = {
        "data.name": "transfer",
        "data.suite": study.suite,
        "data.task_name": task.name,
        "data.stage": stage,
        "data.root": study.root,
        "data.resize": "squash",
        "data.in_memory": True,
        "seed": seed,
    }
    config = resolve_config(apply_overrides(method.recipe, {**setting, **data}))
    epochs = config["schedule"]["epochs"]
    config["validation"]["interval_epochs"] = config["checkpoint"]["interval_epochs"] = epochs
    config["checkpoint"]["keep"] = 1
    counted = copy.deepcopy({key: value for key, value in config.items() if key not in _BOOKKEEPING})
    for key in _WHERE:
        counted["data"].pop(key, None)
    counted["data"]["suite"] = get_suite(study.suite).name
    return Cell(_hash(counted), stage, setting, seed, config)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def total(study: Study) -> int:
    """The number of cells of the whole study."""
    each = (len(m.grid) * len(study.sweep_seeds) * (len(m.grid) > 1) + len(study.seeds) for m in study.methods)
    return len(study.tasks) * sum(each)


def cells_of(study: Study, method: Method, task: TransferTask, results: Results) -> tuple[list[Cell], list[Cell]]:
    """(cells of the selection, final cells); the latter are empty until the selection has ended, or found nothing."""
    selection = []
    if len(method.grid) > 1:
        settings = itertools.product(method.grid, study.sweep_seeds)
        selection = [cell_of(study, method, task, "select", setting, seed) for setting, seed in settings]
    if any(_pending(cell, results, study) for cell in selection):
        return selection, []
    setting = selected(selection, results) if selection else method.grid[0]
    if setting is None:
        return selection, []
    return selection, [cell_of(study, method, task, "final", setting, seed) for seed in study.seeds]


def _pending(cell: Cell, results: Results, study: Study) -> bool:
    line = results.get(cell.key)
    return line is None or (line["status"] == "failed" and (cell.key, line["time"]) in study.retry)


def selected(cells: Sequence[Cell], results: Results) -> Setting | None:
    """The setting with the best mean accuracy on val200 over its seeds; of equals that with the smaller learning rate.

    Settings of which a cell failed are out; None when all are.
    """
    found: dict[str, tuple[Setting, list[Line | None]]] = {}
    for cell in cells:
        found.setdefault(_hash(cell.setting), (cell.setting, []))[1].append(results.get(cell.key))
    best, best_rank = None, (-math.inf, -math.inf)
    for setting, lines in found.values():
        if all(line is not None and line["status"] == "done" for line in lines):
            accuracy = statistics.fmean(line["accuracy"] for line in lines if line is not None)
            rank = (round(accuracy, 12), -float(setting.get("optimizer.lr", 0.0)))
            if rank > best_rank:
                best, best_rank = setting, rank
    return best


def ready(study: Study, results: Results) -> Iterator[Unit]:
    """Units that can be computed now, by what `results` holds; each with only the cells that are not done yet."""
    for task, method in itertools.product(study.tasks, study.methods):
        for cells in cells_of(study, method, task, results):
            groups: dict[str, list[Cell]] = {}
            for cell in cells:
                groups.setdefault(_frozen_group(cell) or cell.key, []).append(cell)
            for group, members in groups.items():
                pending = tuple(cell for cell in members if _pending(cell, results, study))
                if pending:
                    yield Unit(group, task, method, pending, group != pending[0].key)


def finished(study: Study, results: Results) -> bool:
    """Whether every cell that can ever be computed has ended."""
    return next(ready(study, results), None) is None


def all_measured(study: Study, results: Results) -> bool:
    """Whether every task has its final result by every method and seed; settings that failed do not matter."""
    for task, method in itertools.product(study.tasks, study.methods):
        _, final = cells_of(study, method, task, results)
        if not final or any((results.get(cell.key) or {}).get("status") != "done" for cell in final):
            return False
    return True


def _frozen_group(cell: Cell) -> str | None:
    """What cells of a probe on the same frozen features have in common: all but rates and seed. None for others."""
    adapter = cell.config["adapter"]
    if isinstance(adapter, list) and len(adapter) == 1:
        adapter = adapter[0]
    if not isinstance(adapter, Mapping) or adapter.get("method") not in _FROZEN:
        return None
    rest = {key: value for key, value in cell.config.items() if key not in (*_BOOKKEEPING, "seed", "optimizer")}
    optimizer = {key: value for key, value in cell.config["optimizer"].items() if f"optimizer.{key}" not in _RATES}
    return _hash([rest, optimizer])
