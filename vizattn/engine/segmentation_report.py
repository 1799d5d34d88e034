"""The report of a segmentation run: one page with curves, the IoU of each class, best and worst images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vizattn.engine.pictures import Palette, legend, overlay, plain_item, segment
from vizattn.engine.report import figure_html, image_html, paragraph, table_html, write_page
from vizattn.engine.run_report import Measured, image_name, result_rows, sections_about, training_section
from vizattn.engine.segmentation import confusion, iou_of

__all__ = ["write_report"]

_LOOKED_AT = 100
_SHOWN = 4


def write_report(path: Path, result: Any, measured: Measured) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        result: What `train` gives; its metrics of the split are shown.
        measured: The split, in which the best and the worst images are looked for: among at most 100, spread evenly.
    """
    split, dataset, palette = measured.split, measured.dataset, measured.palette
    assert palette is not None
    metrics = result.metrics[split]
    means = [(title, f"{metrics[key]:.2%}") for key, title in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc"))]
    rows = [
        *means,
        ("images", metrics["samples"]),
        *result_rows(result),
    ]
    looked = _look(measured.task, dataset, len(result.class_names))
    shown = _pictures(looked, dataset, palette)
    how = paragraph(
        f"By mIoU, among {len(looked)} of {len(dataset)} images of {split}. From left: image, labels, prediction; "
        "ignored pixels keep the image."
    )
    write_page(
        path,
        f"{Path(result.work_dir).name}: segmentation by {result.config['model']['name']}",
        [
            (f"Result on {split}", table_html(("measure", "value"), rows)),
            ("IoU of each class", figure_html(_bars(metrics["iou_per_class"], palette), "IoU of each class")),
            training_section(result, "miou", "mIoU"),
            ("Worst and best images", how + "".join(shown)),
            ("Classes", image_html(legend(result.class_names, palette), "colours of the classes")),
            *sections_about(result),
        ],
    )


def _look(task: nn.Module, dataset: Any, num_classes: int) -> list[tuple[float, int, np.ndarray]]:
    """(mIoU, index, prediction) of images that have labelled pixels, worst first."""
    places = np.unique(np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset))).round().astype(int))
    found = []
    for place in places.tolist():
        image, labels = plain_item(dataset, place)
        mask = segment(task, dataset.transform, image)
        iou, _ = iou_of(confusion(torch.from_numpy(mask), torch.from_numpy(labels), num_classes).double())
        if not iou.isnan().all():
            found.append((iou.nanmean().item(), place, mask))
    return sorted(found, key=lambda row: row[:2])


def _pictures(looked: Sequence[tuple[float, int, np.ndarray]], dataset: Any, palette: Palette) -> list[str]:
    chosen = {row[1]: row for row in [*looked[:_SHOWN], *looked[-_SHOWN:]]}
    pictures = []
    for iou, place, mask in chosen.values():
        image, labels = plain_item(dataset, place)
        parts = [image, overlay(image, labels, palette), overlay(image, mask, palette)]
        picture = Image.fromarray(np.concatenate([*map(np.asarray, parts)], axis=1))
        picture.thumbnail((1200, 400))
        enlarged = max(1, 160 // picture.height)
        picture = picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST)
        pictures.append(image_html(picture, f"{image_name(dataset, place)}: mIoU {iou:.2%}"))
    return pictures


def _bars(iou: dict[str, float | None], palette: Palette) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.24 * len(iou)))
    axes = figure.subplots()
    names = [f"{name}" + (" (never seen)" if value is None else "") for name, value in iou.items()]
    colours = [tuple(channel / 255 for channel in colour) for colour in palette]
    axes.barh(names, [value or 0.0 for value in iou.values()], color=colours[: len(names)], edgecolor="#444")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("IoU")
    return figure
