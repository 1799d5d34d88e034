"""What was measured, one row a case, and the CSV file that keeps it."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vizattn.attention import native
from vizattn.bench.case import Case
from vizattn.errors import VizattnError
from vizattn.files import write_text

if TYPE_CHECKING:
    from vizattn.bench.timing import Times

__all__ = ["Row", "context_here", "make_row", "read_rows", "write_rows"]


@dataclass(frozen=True)
class Row:
    """One case, measured. Spreads are quartiles over the rounds; what was not measured is None."""

    group: str
    subject: str
    name: str
    ours: bool
    mode: str
    batch: int
    size: str
    dtype: str
    variant: str
    threads: int
    rounds: int
    seconds: float | None
    """Median of one run."""
    seconds_low: float | None
    seconds_high: float | None
    reference: str
    """The case whose time is the unit of `ratio`."""
    ratio: float | None
    """Median over rounds of this case's time in units of the reference's in the same round."""
    ratio_low: float | None
    ratio_high: float | None
    images_per_second: float | None
    gmacs: float | None
    """Thousand million multiply-adds of one run."""
    gflops: float | None
    """Thousand million operations a second: two for each multiply-add."""
    peak_gflops: float | None
    """The same of a product of large matrices of this type, timed in the same rounds."""
    built_mb: float | None
    """Memory that building leaves: weights and inputs."""
    run_mb: float | None
    """Peak memory above that while it runs."""
    note: str
    """Why there is no time."""
    machine: str
    versions: str
    command: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for the same case in two results."""
        return (
            *(self.group, self.subject, self.name, self.mode, self.batch),
            *(self.size, self.dtype, self.variant, self.threads),
        )

    @property
    def times(self) -> tuple[float, float, float] | None:
        """Seconds: lower quartile, median, upper quartile."""
        return _whole(self.seconds_low, self.seconds, self.seconds_high)

    @property
    def ratios(self) -> tuple[float, float, float] | None:
        """The same of the ratio to the reference."""
        return _whole(self.ratio_low, self.ratio, self.ratio_high)


def _whole(low: float | None, middle: float | None, high: float | None) -> tuple[float, float, float] | None:
    return None if low is None or middle is None or high is None else (low, middle, high)


def context_here(command: str) -> dict[str, str]:
    """The columns that tell where and how rows came about."""
    import timm
    import torch

    from vizattn.version import __version__

    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    versions["attention"] = "torch alone" if native.library is None else "compiled"
    return {
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()}",
        "versions": ", ".join(f"{name} {version}" for name, version in ({"vizattn": __version__} | versions).items()),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def make_row(
    case: Case,
    times: Times,
    reference: tuple[str, list[float]],
    products: Sequence[float],
    memory: tuple[float, float] | None,
    threads: int,
    context: dict[str, str],
) -> Row:
    """The row of one case.

    Args:
        case: What was measured.
        times: What was found.
        reference: Name of the case that is the unit, and its seconds in each round.
        products: Multiply-adds a second of large matrices, in each round.
        memory: Megabytes after building, and above that while running.
        threads: Threads it had.
        context: Columns of `context_here`.
    """
    middle = float(np.median(times.seconds)) if times.seconds else None
    low, high = _quartiles(times.seconds)
    unit = reference[1] if times.seconds else []
    ratios = [own / other for own, other in zip(times.seconds, unit)]
    macs = times.macs if times.macs else None  # nothing that is counted: no products
    return Row(
        group=case.group,
        subject=case.subject,
        name=case.name,
        ours=case.ours,
        mode=case.mode,
        batch=case.batch,
        size=case.size,
        dtype=case.dtype,
        variant=case.variant,
        threads=threads,
        rounds=len(times.seconds),
        seconds=middle,
        seconds_low=low,
        seconds_high=high,
        reference=reference[0],
        ratio=float(np.median(ratios)) if ratios else None,
        ratio_low=_quartiles(ratios)[0],
        ratio_high=_quartiles(ratios)[1],
        images_per_second=times.images / middle if middle and times.images else None,
        gmacs=macs / 1e9 if macs else None,
        gflops=2 * macs / middle / 1e9 if macs and middle else None,
        peak_gflops=2 * float(np.median(products)) / 1e9 if products else None,
        built_mb=memory[0] if memory else None,
        run_mb=memory[1] if memory else None,
        note=times.note,
        **{key: context.get(key, "") for key in ("machine", "versions", "command", "date")},
    )


def _quartiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    return (float(np.quantile(values, 0.25)), float(np.quantile(values, 0.75))) if values else (None, None)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a CSV file, whole or not at all."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows([[_text(value) for value in astuple(row)] for row in rows])
    write_text(path, file.getvalue())


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` wrote.

    Raises:
        VizattnError: It has other columns, or a value that does not fit its column.
        OSError: It cannot be read.
    """
    with path.open(encoding="utf-8", newline="") as file:
        try:
            table = list(csv.reader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise VizattnError(f"{path} is not a CSV file: {error}") from error
    columns = [field.name for field in fields(Row)]
    if not table or table[0] != columns:
        found = ", ".join(table[0]) if table else "nothing"
        raise VizattnError(f"{path} is not a result of `vizattn bench`: its columns are {found[:200]}.")
    kinds = [str(field.type) for field in fields(Row)]
    rows = []
    for number, line in enumerate(table[1:], 2):
        try:
            rows.append(Row(*(_value(text, kind) for text, kind in zip(line, kinds, strict=True))))
        except ValueError as error:
            raise VizattnError(f"{path}, line {number} is damaged: {error}") from error
    return rows


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if kind == "int":
        return int(text)
    if kind == "bool":
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    return float(text) if text else None
