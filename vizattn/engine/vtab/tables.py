"""The tables of a transfer study: lines of results to rows of numbers, nothing averaged that is not whole."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vizattn.data.transfer import Suite
from vizattn.engine.vtab.results import Line

__all__ = ["PUBLISHED", "Published", "Row", "Score", "rows_of"]


@dataclass
class Score:
    """Test accuracy of a task, in per cent, over seeds."""

    values: list[float]
    setting: dict[str, Any]
    seconds: float
    """Of one final training, with its evaluation."""
    sweep_seconds: float
    """Of the whole selection, without the pass of the backbone for its features."""
    pass_seconds: float
    """Of that pass; 0 where the backbone is in the loop, or its features were there already."""
    params: dict[str, int]
    peak_memory_mb: float
    samples: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over seeds; 0 of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass
class Row:
    """One method on one backbone."""

    backbone: str
    method: str
    options: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)
    """By task; those without a finished final cell are not in it."""
    failures: dict[str, str] = field(default_factory=dict)
    """The reason of a task's last failure, where there is no score, or one over fewer seeds than were run."""
    failed_settings: int = 0
    """Cells of selections that failed; they count as settings not chosen."""

    @property
    def name(self) -> str:
        """The method, with its options."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.method} ({options})" if options else self.method

    def missing(self, suite: Suite) -> list[str]:
        """Tasks of the suite that have no score."""
        return [task.name for task in suite.tasks if task.name not in self.scores]

    def group_mean(self, suite: Suite, group: str) -> float | None:
        """Mean over the tasks of a group; None unless all are there."""
        names = [task.name for task in suite.tasks if task.group == group]
        if any(name not in self.scores for name in names):
            return None
        return statistics.fmean(self.scores[name].mean for name in names)

    def mean_groups(self, suite: Suite) -> float | None:
        """Mean of the group means ("mean-3" of VTAB-1k)."""
        means = [self.group_mean(suite, group) for group in suite.groups]
        return None if None in means else statistics.fmean(mean for mean in means if mean is not None)

    def mean_tasks(self, suite: Suite) -> float | None:
        """Mean over all tasks ("mean-19" of VTAB-1k)."""
        if self.missing(suite):
            return None
        return statistics.fmean(self.scores[task.name].mean for task in suite.tasks)

    def params(self, which: str) -> float | None:
        """Mean over tasks of the trained parameters, "with_head" or "without_head"."""
        values = [score.params[which] for score in self.scores.values()]
        return statistics.fmean(values) if values else None


def rows_of(lines: Iterable[Line], suite: Suite) -> list[Row]:
    """A row for each backbone, method and recipe that has lines of the suite, in the order in which they came."""
    rows: dict[str, Row] = {}
    of_task: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["suite"] == suite.name:
            if line["row"] not in rows:
                rows[line["row"]] = Row(line["backbone"], line["method"], _options(line["adapter"]))
            of_task.setdefault((line["row"], line["task"]), []).append(line)
    for (key, task), found in of_task.items():
        _fill(rows[key], task, found)
    named: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        named.setdefault((row.backbone, row.name), []).append(row)
    for same in named.values():
        for number, row in enumerate(same[1:], 2):  # other recipes, such as of more epochs
            row.method += f" #{number}"
    return [*rows.values()]


def _options(adapter: Any) -> dict[str, Any]:
    adapters = adapter if isinstance(adapter, list) else [adapter] if adapter else []
    return {key: value for entry in adapters for key, value in entry.items() if key != "method"}


def _fill(row: Row, task: str, lines: Sequence[Line]) -> None:
    finals = [line for line in lines if line["stage"] == "final"]
    selection = [line for line in lines if line["stage"] == "select"]
    row.failed_settings += sum(line["status"] == "failed" for line in selection)
    done = [line for line in finals if line["status"] == "done"]
    if done:
        newest = done[-1]["setting"]  # a wider sweep may have chosen anew
        done = [line for line in done if line["setting"] == newest]
        row.scores[task] = Score(
            values=[100 * line["accuracy"] for line in done],
            setting=newest,
            seconds=statistics.fmean(line["seconds"] for line in done),
            sweep_seconds=sum(line.get("seconds", 0.0) for line in selection),
            pass_seconds=max((line.get("pass_seconds", 0.0) for line in lines), default=0.0),
            params=done[0]["params"],
            peak_memory_mb=max(line["peak_memory_mb"] for line in lines if line["status"] == "done"),
            samples=done[0]["samples"],
        )
        reasons = [line["reason"] for line in finals if line["status"] == "failed" and line["setting"] == newest]
        if reasons:
            row.failures[task] = f"{len(reasons)} of {len(reasons) + len(done)} seeds failed: {reasons[-1]}"
    else:
        reasons = [line["reason"] for line in lines if line["status"] == "failed"]
        row.failures[task] = reasons[-1] if reasons else "not finished"


@dataclass(frozen=True)
class Published:
    """A published row for ViT-B/16 (ImageNet-21k) on VTAB-1k, in per cent."""

    method: str
    millions: float
    """Trained parameters without the head, 10^6."""
    groups: tuple[float, float, float] | None
    """Natural, specialized, structured."""
    mean_groups: float | None
    mean_tasks: float | None
    stricter: str = ""
    """Mean of group means when evaluated again without choosing by test accuracy."""


PUBLISHED = (
    Published("full", 85.8, (75.9, 83.4, 47.6), 69.0, 65.6, "74.2"),
    Published("linear_probe", 0, (68.9, 77.2, 26.9), 57.6, 52.9),
    Published("BitFit", 0.10, (73.3, 78.3, 44.1), 65.2, 62.1),
    Published("vpt", 0.56, (78.5, 82.4, 55.0), 72.0, 69.4, "76.4"),
    Published("LoRA r8", 0.29, (79.5, 84.6, 59.8), 74.6, 72.3, "75.6"),
    Published("AdaptFormer", 0.16, (80.6, 84.9, 58.8), 74.8, 72.3),
    Published("SSF", 0.21, (81.6, 86.6, 59.0), 75.7, 73.1, "74.6"),
    Published("FacT", 0.07, (80.6, 85.3, 60.7), 75.6, 73.2, "75.5-76.5"),
    Published("RepAdapter", 0.22, (81.6, 85.4, 61.2), 76.1, 73.8),
    Published("SCT", 0.11, (82.2, 85.9, 59.9), 76.0, 73.6),
    Published("Adapter+ r8", 0.20, None, None, None, "77.4"),
    Published("hst", 0.78, (82.8, 87.1, 64.5), 78.1, 76.0),
)
"""As published. Means of groups: (natural + specialized + structured) / 3."""
