"""What the reports of all runs share: curves, the adapter, the command and its environment."""

from __future__ import annotations

import dataclasses
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vizattn.adapters import attached
from vizattn.engine.charts import line_chart
from vizattn.engine.pictures import Palette
from vizattn.engine.report import table_html
from vizattn.files import read_json_lines

__all__ = ["Measured", "image_name", "result_rows", "sections_about", "training_section"]

Section = tuple[str, str]
"""A heading and HTML."""


@dataclass(frozen=True)
class Measured:
    """The images that a report is about."""

    split: str
    """Name of the split."""
    dataset: Any
    """Its images, with the transform of evaluation."""
    task: nn.Module
    """The trained task, in evaluation mode."""
    palette: Palette | None
    """Colours of the classes, of a segmentation."""
    record: Any
    """What the task's `Kind.record` saw while the split was measured; None where there is none."""


def result_rows(result: Any) -> list[tuple[str, Any]]:
    """Size and cost, as rows of a table; `result` is what `train` gives."""
    return [
        ("trained parameters", f"{result.params['with_head']:,} of {result.params['total']:,}"),
        ("seconds", result.seconds),
        ("peak memory (MB)", result.peak_memory_mb),
    ]


def training_section(result: Any, metric: str, title: str) -> Section:
    """Curves of the loss, of the validation `metric`, and of the learning rate, from the run's `metrics.jsonl`."""
    path = Path(result.work_dir) / "metrics.jsonl"
    lines = [line for line in read_json_lines(path) if isinstance(line.get("iteration"), int)] if path.is_file() else []
    of_training = [line for line in lines if all(isinstance(line.get(key), int | float) for key in ("loss", "lr"))]
    measured = [line for line in lines if isinstance(line.get("val"), dict)]
    of_validation = [line for line in measured if isinstance(line["val"].get(metric), int | float)]
    charts = [
        line_chart([(line["iteration"], line["loss"]) for line in of_training], "loss"),
        line_chart([(line["iteration"], line["val"][metric]) for line in of_validation], f"validation {title}"),
        line_chart([(line["iteration"], line["lr"]) for line in of_training], "learning rate"),
    ]
    return "Training", f"<div>{''.join(charts)}</div>"


def sections_about(result: Any) -> list[Section]:
    """The adapter, the command with its environment, and the recipe."""
    folder = Path(result.exported)
    size = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    rows: list[tuple[str, Any]] = []
    for a in attached(result.model):
        options = ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(a.options).items())
        rows.append((a.method, options or "no options"))
        rows.append((f"{a.method} merges", "yes" if a.options.mergeable is True else f"no: {a.options.mergeable}"))
    rows += [
        ("backbone", result.config["model"]["name"]),
        ("trained, with the head", f"{result.params['with_head']:,}"),
        ("trained, without the head", f"{result.params['without_head']:,}"),
        ("all parameters", f"{result.params['total']:,}"),
        (f"{folder.name} (kB)", f"{size / 1000:,.0f}"),
    ]
    how = [("command", result.command), ("seed", result.seed), *result.versions.items()]
    return [
        ("Adapter" if attached(result.model) else "Model", table_html(("what", "value"), rows)),
        ("How", table_html(("what", "value"), how)),
        ("Recipe", f"<pre>{html.escape(json.dumps(result.config, indent=2))}</pre>"),
    ]


def image_name(dataset: Any, place: int) -> str:
    """What to call an image of a data set."""
    return Path(dataset.paths[place]).name if hasattr(dataset, "paths") else f"image {place}"
