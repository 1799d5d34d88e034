"""The report of a classification run: one page with curves, each class, what is taken for what, the worst mistakes."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric
from PIL import Image
from torch import Tensor

from vizattn.engine.pictures import plain_item
from vizattn.engine.report import image_html, paragraph, table_html, write_page
from vizattn.engine.run_report import Measured, image_name, result_rows, sections_about, training_section

__all__ = ["PredictionRecord", "write_report"]

_MATRIX = 30
"""Classes up to which all pairs are shown."""
_ROWS = 100
"""Classes shown by themselves, the worst first."""
_PAIRS = 10
_PICTURES = 24
_PIXELS = 128


class PredictionRecord(BaseMetric):
    """Keeps what was predicted of each image while other metrics are measured; it gives no figure of its own.

    Attributes:
        labels, predicted: Class indices (N,), in the order of the data set, over all processes.
        confidence: Probability of the predicted class (N,).
    """

    default_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []
        self.labels = self.predicted = torch.empty(0, dtype=torch.int64)
        self.confidence = torch.empty(0)

    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        """Keep one batch: `data_batch` is (inputs, labels (B,)), `data_samples` the B rows of logits (classes,)."""
        confidence, predicted = torch.stack(list(data_samples)).float().softmax(1).cpu().max(1)
        self.rows.append(torch.stack([data_batch[1].cpu().double(), predicted.double(), confidence.double()], 1))

    def evaluate(self, size: int) -> dict[str, Any]:
        """Put the rows of all processes in order; process r of n saw the images r, r + n, ..."""
        each = dist.all_gather_object(torch.cat(self.rows) if self.rows else torch.empty(0, 3).double())
        together = torch.empty(sum(map(len, each)), 3, dtype=torch.float64)
        for rank, rows in enumerate(each):
            together[rank :: len(each)] = rows
        self.rows = []
        self.labels, self.predicted = together[:, 0].long(), together[:, 1].long()
        self.confidence = together[:, 2].float()
        return {}

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Unused, see `evaluate`."""
        raise NotImplementedError


def write_report(path: Path, result: Any, measured: Measured) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        result: What `train` gives; its metrics of the split are shown.
        measured: The split; its record is a `PredictionRecord`.
    """
    metrics, names, record = result.metrics[measured.split], result.class_names, measured.record
    rows = [
        ("accuracy", f"{metrics['accuracy']:.2%}"),
        *([("top-5 accuracy", f"{metrics['accuracy_top5']:.2%}")] if len(names) > 5 else []),
        ("cross entropy", f"{metrics['loss']:.4f}"),
        ("images", f"{metrics['samples']:,}"),
        *result_rows(result),
    ]
    places = record.labels * len(names) + record.predicted
    pairs, counts = places.unique(return_counts=True)
    found = {divmod(pair, len(names)): count for pair, count in zip(pairs.tolist(), counts.tolist())}
    mistakes = (record.labels != record.predicted).nonzero().flatten()
    write_page(
        path,
        f"{Path(result.work_dir).name}: classification by {result.config['model']['name']}",
        [
            (f"Result on {measured.split}", table_html(("measure", "value"), rows)),
            training_section(result, "accuracy", "accuracy"),
            ("Each class", _classes(found, names)),
            ("What is taken for what", (_matrix(found, names) if len(names) <= _MATRIX else "") + _pairs(found, names)),
            ("Worst mistakes", _worst(measured, mistakes, names)),
            *sections_about(result),
        ],
    )


Counts = dict[tuple[int, int], int]
"""Images by (class, predicted class); pairs that never occur are left out."""


def _classes(found: Counts, names: Sequence[str]) -> str:
    """Images, recall, precision and F1 of each class, the lowest F1 first; classes without images come last."""
    images, predicted = Counter[int](), Counter[int]()
    for (label, guess), count in found.items():
        images[label] += count
        predicted[guess] += count
    rows: list[tuple[float, tuple[Any, ...]]] = []
    for k, name in enumerate(names):
        hits = found.get((k, k), 0)
        figures = [hits / total if total else None for total in (images[k], predicted[k])]
        figures.append(2 * hits / (images[k] + predicted[k]) if images[k] else None)
        shown = ["-" if value is None else f"{value:.2%}" for value in figures]
        rows.append((2.0 if figures[2] is None else figures[2], (name, images[k], *shown)))
    rows.sort(key=lambda row: row[0])
    note = paragraph(f"The {_ROWS} worst of {len(names)} classes.") if len(rows) > _ROWS else ""
    return note + table_html(("class", "images", "recall", "precision", "F1"), [row for _, row in rows[:_ROWS]])


def _matrix(found: Counts, names: Sequence[str]) -> str:
    """A row a class, a column a predicted class; the darker, the larger the share of the row."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = []
    for k, name in enumerate(names):
        row = [found.get((k, guess), 0) for guess in range(len(names))]
        cells = []
        for guess, count in enumerate(row):
            share = count / sum(row) if count else 0.0
            colour = "31, 95, 168" if guess == k else "176, 0, 32"
            text = "color: #fff; " if share > 0.6 else ""
            style = f' style="{text}background: rgba({colour}, {share:.3f})"' if count else ""
            told = html.escape(f"{name} taken for {names[guess]}: {count} of {sum(row)}")
            cells.append(f'<td{style} title="{told}">{count or ""}</td>')
        body.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return (
        paragraph("Rows are the classes, columns what they were taken for.")
        + f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        + f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _pairs(found: Counts, names: Sequence[str]) -> str:
    """The most frequent mistakes."""
    wrong = sorted((-count, pair) for pair, count in found.items() if pair[0] != pair[1])[:_PAIRS]
    rows = [(names[label], names[guess], -count) for count, (label, guess) in wrong]
    return table_html(("class", "taken for", "images"), rows) if rows else paragraph("No image was taken for another.")


def _worst(measured: Measured, mistakes: Tensor, names: Sequence[str]) -> str:
    """Pictures of the mistakes that the model was surest of."""
    record = measured.record
    order = record.confidence[mistakes].argsort(descending=True, stable=True)[:_PICTURES]
    figures = []
    for place in mistakes[order].tolist():
        picture, _ = plain_item(measured.dataset, place)
        picture = picture.convert("RGB")
        picture.thumbnail((_PIXELS, _PIXELS))
        enlarged = max(1, _PIXELS // max(picture.size))
        picture = picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST)
        guess, label = names[int(record.predicted[place])], names[int(record.labels[place])]
        caption = f"{guess} ({record.confidence[place]:.0%}), is {label}"
        figures.append(image_html(picture, f"{image_name(measured.dataset, place)}: {caption}", wrong=True))
    said = f"{len(mistakes):,} of {len(record.labels):,} images are mistaken"
    surest = f"; the {len(figures)} of which the model was surest" if len(figures) < len(mistakes) else ""
    return paragraph(f"{said}{surest}.") + f'<div class="grid">{"".join(figures)}</div>'
