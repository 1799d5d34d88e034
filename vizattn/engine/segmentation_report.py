"""The report of a segmentation run: one page with curves, the IoU of each class, best and worst images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vizattn.engine.pictures import Palette, legend, overlay, plain_item, segment
from vizattn.engine.report import figure_html, image_html, paragraph, table_html, write_page
from vizattn.engine.segmentation import confusion, iou_of

__all__ = ["write_report"]

_LOOKED_AT = 100
_SHOWN = 4


def write_report(path: Path, result: Any, task: nn.Module, split: str, dataset: Any, palette: Palette) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        result: What `train` gives; its metrics of `split` are shown.
        task: The trained `SegmentationTask`, in evaluation mode.
        split: Name of the split that `dataset` is.
        dataset: Images to look for the best and the worst in: at most 100 of them, spread evenly.
        palette: Colours of the classes.
    """
    metrics = result.metrics[split]
    means = [(title, f"{metrics[key]:.2%}") for key, title in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc"))]
    rows = [
        *means,
        ("images", metrics["samples"]),
        ("trained parameters", f"{result.params['with_head']:,} of {result.params['total']:,}"),
        ("seconds", result.seconds),
        ("peak memory (MB)", result.peak_memory_mb),
    ]
    looked = _look(task, dataset, len(result.class_names))
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
            ("Training", figure_html(_curves(Path(result.work_dir) / "metrics.jsonl"), "Loss and validation mIoU")),
            ("Worst and best images", how + "".join(shown)),
            ("Classes", image_html(legend(result.class_names, palette), "colours of the classes")),
            ("How", table_html(("what", "value"), [("command", result.command), *result.versions.items()])),
            ("Recipe", f"<pre>{json.dumps(result.config, indent=2)}</pre>"),
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
        name = Path(dataset.paths[place]).name if hasattr(dataset, "paths") else f"image {place}"
        pictures.append(image_html(picture, f"{name}: mIoU {iou:.2%}"))
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


def _curves(path: Path) -> Any:
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [(line["iteration"], line["loss"]) for line in lines if "loss" in line]
    measured = [(line["iteration"], line["val"]["miou"]) for line in lines if "val" in line]
    figure = Figure(figsize=(9, 3))
    for axes, points, title in zip(figure.subplots(1, 2), (losses, measured), ("loss", "validation mIoU")):
        axes.plot([x for x, _ in points], [y for _, y in points], marker="." if len(points) < 30 else None)
        axes.set_xlabel("iteration")
        axes.set_title(title)
    figure.tight_layout()
    return figure
