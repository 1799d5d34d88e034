"""What this repository measured: `model_cards/results.csv`, one row a measurement, the newest of a kind last."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import subprocess
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import timm
import torch

from vizattn.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "model_cards" / "results.csv"
# What a measurement depends on; elsewhere uncommitted changes do not matter.
MEASURED = ("models", "vizattn/attention", "vizattn/layers", "vizattn/data", "vizattn/weights")


@dataclass(frozen=True)
class Result:
    """One measurement of the backbone `name`, or of its weights ``name.tag``; `command` gives it again."""

    name: str
    metric: str
    value: float
    unit: str
    command: str
    commit: str
    versions: str
    date: str

    @property
    def backbone(self) -> str:
        """The name without its tag."""
        return self.name.partition(".")[0]


def measured(name: str, metric: str, value: float, unit: str, command: str) -> Result:
    """A measurement made here and now."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return Result(name, metric, value, unit, command, _commit(), versions, datetime.date.today().isoformat())


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def read_results(path: Path = RESULTS) -> list[Result]:
    """All rows, in their order.

    Raises:
        ValueError: The table has other columns, or a value is not a number.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    columns = [field.name for field in fields(Result)]
    if rows[0] != columns:
        raise ValueError(f"{path.name} must have the columns {', '.join(columns)}, not {', '.join(rows[0])}.")
    results = []
    for number, row in enumerate(rows[1:], 2):
        try:
            name, metric, value, *rest = row
            results.append(Result(name, metric, float(value), *rest))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name}, row {number} is damaged: {error}") from error
    return results


def append_results(new: list[Result], path: Path = RESULTS) -> None:
    """Write `new` below what is there."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(Result)])
    for result in [*read_results(path), *new]:
        writer.writerow([f"{value:.12g}" if isinstance(value, float) else value for value in astuple(result)])
    write_text(path, file.getvalue())


def newest(results: list[Result]) -> dict[tuple[str, str], Result]:
    """(name, metric) -> the last measurement."""
    return {(result.name, result.metric): result for result in results}
