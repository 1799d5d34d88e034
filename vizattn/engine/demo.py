"""The demonstration: one small backbone, pretrained on letters, adapted to handwritten digits by each method."""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vizattn.adapters import query_maps
from vizattn.data import build_dataset, build_transforms
from vizattn.engine.evaluate import load_trained
from vizattn.engine.report import figure_html, image_html, paragraph, table_html, write_page
from vizattn.engine.train import Result, train, versions
from vizattn.errors import VizattnError
from vizattn.files import explain_disk_errors, prepare_folder, replacing, write_text

__all__ = ["METHODS", "Row", "check_bundles", "run_demo", "table_rows", "write_results"]

#: Each is the packaged recipe classification/digits_<name>.
METHODS = ("linear_probe", "efficient_probing", "vpt", "apla", "hst", "full", "scratch")
BASELINES = ("linear_probe", "scratch")
ADAPTERS = ("efficient_probing", "vpt", "apla", "hst")

Progress = Callable[[str, int, int, int], None]
"""Called with (method, seed, iterations done, iterations in all)."""


@dataclass
class Row:
    """One method, over all seeds."""

    method: str
    params: int
    """Trainable, with the head."""
    params_without_head: int
    accuracy_mean: float
    accuracy_std: float
    val_accuracy_mean: float
    seconds: float
    """Mean of a run, evaluation included."""
    peak_memory_mb: float
    """Largest resident memory of the process, libraries included."""
    bundle_kb: float
    note: str = ""


def run_demo(folder: Path, seeds: Sequence[int], methods: Sequence[str], progress: Progress) -> list[Row]:
    """Train every method with every seed; leaves one bundle a method in ``folder/<method>``.

    Raises:
        VizattnError: The disk cannot be written, or training failed.
    """
    rows = []
    with explain_disk_errors(folder), _own_feature_cache():
        prepare_folder(folder)
        for method in methods:
            results: list[Result] = []
            for seed in seeds:
                result = train(
                    f"classification/digits_{method}",
                    work_dir=folder / "runs" / f"{method}-seed{seed}",
                    overrides={"seed": seed},
                    quiet=True,
                    progress=lambda done, total, _, m=method, s=seed: progress(m, s, done, total),  # type: ignore[misc]
                )
                result.model = torch.nn.Identity()  # one model at a time in memory
                results.append(result)
                gc.collect()
            shutil.rmtree(folder / method, ignore_errors=True)
            shutil.copytree(results[0].exported, folder / method)
            rows.append(_row(method, results, folder / method))
    _judge(rows)
    return rows


@contextmanager
def _own_feature_cache() -> Iterator[None]:
    """Features are stored anew, so that the seconds are those of a first run."""
    before = os.environ.get("VIZATTN_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VIZATTN_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["VIZATTN_HOME"]
            else:
                os.environ["VIZATTN_HOME"] = before


def _row(method: str, results: list[Result], bundle: Path) -> Row:
    accuracy = [r.metrics["test"]["accuracy"] for r in results]
    return Row(
        method=method,
        params=results[0].params["with_head"],
        params_without_head=results[0].params["without_head"],
        accuracy_mean=statistics.mean(accuracy),
        accuracy_std=statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        val_accuracy_mean=statistics.mean(r.metrics["val"]["accuracy"] for r in results),
        seconds=statistics.mean(r.seconds for r in results),
        peak_memory_mb=max(r.peak_memory_mb for r in results),
        bundle_kb=sum(f.stat().st_size for f in bundle.iterdir()) / 1024,
    )


def _judge(rows: list[Row]) -> None:
    """Say where an adapter does not beat the baselines it should beat."""
    baselines = {r.method: r.accuracy_mean for r in rows if r.method in BASELINES}
    for row in rows:
        if row.method in ADAPTERS:
            lost = [name for name, accuracy in baselines.items() if row.accuracy_mean <= accuracy]
            row.note = f"does not beat {' and '.join(lost)}" if lost else ""
        elif row.method == "scratch":
            row.note = "control: random weights"


_CHECK = """
import sys
from vizattn.engine import evaluate
for folder in sys.argv[1:]:
    print(repr(evaluate(folder, split="test")["accuracy"]))
"""


def check_bundles(folder: Path, methods: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Load each bundle in a fresh process and measure it again: (accuracy it was saved with, accuracy found).

    Raises:
        VizattnError: A bundle does not reproduce its accuracy exactly.
    """
    folders = [str(folder / m) for m in methods]
    done = subprocess.run([sys.executable, "-c", _CHECK, *folders], capture_output=True, text=True, check=False)
    if done.returncode:
        raise VizattnError(f"The bundles cannot be loaded in a fresh process:\n{done.stderr.strip()[-800:]}")
    found = dict(zip(methods, map(float, done.stdout.split()), strict=True))
    pairs = {}
    for method in methods:
        config = json.loads((folder / method / "adapter_config.json").read_text(encoding="utf-8"))
        pairs[method] = (config["metadata"]["accuracy"]["test"], found[method])
    wrong = [f"{m}: {saved} was saved, {now} is found" for m, (saved, now) in pairs.items() if saved != now]
    if wrong:
        raise VizattnError(f"A bundle does not reproduce its test accuracy: {'; '.join(wrong)}.")
    return pairs


HEADER = ("method", "trainable", "without head", "test accuracy", "seconds", "peak MB", "bundle kB", "note")


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows as text, under `HEADER`."""
    return [
        (
            r.method,
            f"{r.params:,}",
            f"{r.params_without_head:,}",
            f"{r.accuracy_mean:.2%} ± {r.accuracy_std:.2%}",
            f"{r.seconds:.1f}",
            f"{r.peak_memory_mb:.0f}",
            f"{r.bundle_kb:.0f}",
            r.note,
        )
        for r in rows
    ]


def write_results(folder: Path, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Write ``results.csv``, ``accuracy.png`` and ``report.html``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*asdict(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(r) for r in rows)
    figure = _plot(rows)
    with explain_disk_errors(folder):
        write_text(folder / "results.csv", text.getvalue())
        with replacing(folder / "accuracy.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
        best = max(
            (r for r in rows if r.method not in ("full", "scratch")), key=lambda r: r.val_accuracy_mean, default=rows[0]
        )
        sections = [
            ("Results", _results_section(rows, seeds)),
            ("Accuracy against trainable parameters", figure_html(figure, "accuracy against trainable parameters")),
        ]
        if (folder / "efficient_probing").is_dir():
            sections.append(("Where the queries of efficient probing look", _maps_section(folder)))
        sections.append((f"Predictions of {best.method}", _predictions_section(folder / best.method)))
        sections.append(("Environment", table_html(("what", "version"), versions().items())))
        write_page(folder / "report.html", "From letters to handwritten digits", sections)


def _results_section(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    return (
        paragraph(
            "A ViT of 0.7 million parameters, pretrained on drawn letters (no digits), is adapted to scikit-learn's "
            "handwritten digits: 400 for training, 100 for validation, 1,297 for test. Mean and standard deviation "
            f"over {len(seeds)} seeds; every recipe trains for a fixed number of epochs and the last epoch counts."
        )
        + table_html(HEADER, table_rows(rows))
        + paragraph(
            "Peak memory is the process's resident memory, libraries included. Seconds are those of one run with its "
            "evaluation. The bundle of full fine-tuning and of the control holds the whole model."
        )
    )


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _plot(rows: Sequence[Row]) -> Any:
    figure = _new_figure(7.0, 4.2)
    axes = figure.subplots()
    shown = [r for r in rows if r.method != "scratch"] or list(rows)
    low = 100 * min(r.accuracy_mean - 2 * r.accuracy_std for r in shown) - 0.5
    for i, r in enumerate(rows):
        y, below = 100 * r.accuracy_mean, 100 * r.accuracy_mean < low
        label = f"{r.method}, {y:.1f} %" + (" (below the axis)" if below else "")
        if below:  # the control would squeeze the others together
            axes.plot(r.params, low + 0.1, "v", color=f"C{i}", label=label)
        else:
            axes.errorbar(r.params, y, 100 * r.accuracy_std, fmt="o", capsize=3, color=f"C{i}", label=label)
    axes.set_ylim(low, 100.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters, with the head")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    return figure


def _samples(trained: Any, indices: Sequence[int]) -> tuple[torch.Tensor, list[int], list[Any]]:
    transform = build_transforms(trained.preprocessing, train=False)
    dataset = build_dataset("digits", "test", transform=transform)
    plain = build_dataset("digits", "test", transform=None)
    items = [dataset[i] for i in indices]
    return torch.stack([x for x, _ in items]), [y for _, y in items], [plain[i][0] for i in indices]


def _maps_section(folder: Path) -> str:
    trained = load_trained(folder / "efficient_probing")
    images, labels, _ = _samples(trained, range(6))
    with torch.no_grad():
        maps = query_maps(trained.model, images)
    queries = maps.shape[1]
    figure = _new_figure(1.15 * (queries + 2), 1.2 * len(labels))
    axes = figure.subplots(len(labels), queries + 2)
    low, high = images.amin(), images.amax()
    for row, image, own, label in zip(axes, images, maps, labels):
        row[0].imshow(((image - low) / (high - low)).permute(1, 2, 0))
        row[0].set_ylabel(trained.class_names[label], rotation=0, labelpad=12)
        for cell, values in zip(row[1:], [own.mean(0), *own]):
            cell.imshow(values, cmap="magma")
        for cell in row:
            cell.set_xticks([])
            cell.set_yticks([])
    for cell, name in zip(axes[0], ["image", "mean", *(f"query {i + 1}" for i in range(queries))]):
        cell.set_title(name, fontsize=9)
    return figure_html(figure, "attention maps of the queries")


def _predictions_section(bundle: Path) -> str:
    trained = load_trained(bundle)
    images, labels, plain = _samples(trained, range(0, 240, 10))
    with torch.no_grad():
        confidence, predicted = trained.model(images).softmax(dim=1).max(dim=1)
    names = trained.class_names
    figures = [
        image_html(
            picture,
            f"{names[p]} ({c:.0%})" + ("" if p == y else f", is {names[y]}"),
            wrong=p != y,
        )
        for picture, p, c, y in zip(plain, predicted.tolist(), confidence.tolist(), labels)
    ]
    return f'<div class="grid">{"".join(figures)}</div>'
