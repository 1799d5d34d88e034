"""What a transfer study shows: its tables as markdown, CSV and LaTeX, and one HTML page with plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vizattn.data.transfer import Suite
from vizattn.engine.report import figure_html, paragraph, table_html, write_page
from vizattn.engine.vtab.results import Results
from vizattn.engine.vtab.tables import PUBLISHED, Row, rows_of
from vizattn.files import explain_disk_errors, write_text

__all__ = ["summary_table", "write_reports"]

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""

_GAP = "-"


def write_reports(results: Results, suite: Suite, folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.csv``, ``report.tex`` and ``report.html``; gives their paths.

    Raises:
        VizattnError: The disk cannot be written.
    """
    rows = rows_of(results.cells(), suite)
    tables = [
        ("Means", summary_table(rows, suite)),
        ("Accuracy by task", task_table(rows, suite)),
        ("Cost", cost_table(rows, suite)),
        ("Chosen hyper-parameters", setting_table(rows, suite)),
    ]
    if suite.name == "vtab-1k":
        tables.append(("Beside published figures (ViT-B/16, ImageNet-21k)", published_table(rows, suite)))
    notes = _notes(rows, suite)
    pages: dict[str, Callable[[], str]] = {
        "report.md": lambda: _markdown(suite, tables, notes),
        "report.csv": lambda: _csv(rows, suite),
        "report.tex": lambda: _latex(tables),
    }
    with explain_disk_errors(folder, "choose another folder with --to"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            write_text(folder / name, text())
        sections = [("What was measured", "".join(map(paragraph, notes)))]
        sections += [(title, table_html(*table)) for title, table in tables]
        sections[2:2] = [(title, figure_html(figure, title)) for title, figure in _figures(rows, suite)]
        sections.append(("Computed with", table_html(("run", "what"), _runs(results, suite))))
        write_page(folder / "report.html", f"Transfer to {suite.name}", sections)
    return [folder / name for name in (*pages, "report.html")]


def _number(value: float | None, digits: int = 1) -> str:
    return _GAP if value is None else f"{value:,.{digits}f}"


def _count(value: float | None) -> str:
    return _GAP if value is None else f"{value:,.0f}"


def summary_table(rows: Sequence[Row], suite: Suite) -> Table:
    """Group means, the mean of these and the mean over all tasks, in per cent; a gap where a task is missing."""
    groups, count = suite.groups, len(suite.tasks)
    means = [f"mean-{len(groups)}", f"mean-{count}"]
    if len(groups) == count:
        means = ["mean of groups", "mean of tasks"]
    header = ["backbone", "method", *groups, *means]
    header += ["trained, with head", "without head", "tasks"]
    body = [
        [
            row.backbone,
            row.name,
            *(_number(row.group_mean(suite, group)) for group in groups),
            _number(row.mean_groups(suite)),
            _number(row.mean_tasks(suite)),
            _count(row.params("with_head")),
            _count(row.params("without_head")),
            f"{len(row.scores)} of {count}",
        ]
        for row in rows
    ]
    return header, body


def task_table(rows: Sequence[Row], suite: Suite) -> Table:
    """Test accuracy of each task in per cent: mean and standard deviation over seeds."""
    header = ["group", "task", "test images", *(f"{row.method} on {row.backbone}" for row in rows)]
    body = []
    for task in suite.tasks:
        scores = [row.scores.get(task.name) for row in rows]
        samples = next((_count(score.samples) for score in scores if score), _GAP)
        cells = [f"{s.mean:.1f} ± {s.std:.1f} ({len(s.values)})" if s else _GAP for s in scores]
        body.append([task.group, task.name, samples, *cells])
    return header, body


def cost_table(rows: Sequence[Row], suite: Suite) -> Table:
    """Seconds and memory, over the tasks that are there."""
    header = ["backbone", "method", "tasks", "seconds a final run", "seconds of all selections"]
    header += ["seconds of backbone passes", "peak memory, MB"]
    body = []
    for row in rows:
        scores = [*row.scores.values()]
        seconds = sum(score.seconds for score in scores) / len(scores) if scores else None
        sweep = sum(score.sweep_seconds for score in scores)
        memory = max((score.peak_memory_mb for score in scores), default=None)
        passes = sum(score.pass_seconds for score in scores)
        cells = [_number(seconds), _number(sweep), _number(passes), _number(memory, 0)]
        body.append([row.backbone, row.name, f"{len(scores)} of {len(suite.tasks)}", *cells])
    return header, body


def setting_table(rows: Sequence[Row], suite: Suite) -> Table:
    """What the selection chose for each task."""
    header = ["task", *(f"{row.method} on {row.backbone}" for row in rows)]
    body = []
    for task in suite.tasks:
        cells = []
        for row in rows:
            score = row.scores.get(task.name)
            setting = score.setting if score else {}
            cells.append(
                ", ".join(
                    f"{key.split('.')[-1]}={value:g}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in setting.items()
                )
                or _GAP
            )
        body.append([task.name, *cells])
    return header, body


def published_table(rows: Sequence[Row], suite: Suite) -> Table:
    """Our rows over those of the literature."""
    header = ["method", "millions trained, without head", *suite.groups, "mean-3", "mean-19", "mean-3, stricter"]
    body = []
    for row in rows:
        params = row.params("without_head")
        means = [row.group_mean(suite, group) for group in suite.groups]
        means += [row.mean_groups(suite), row.mean_tasks(suite)]
        millions = _number(None if params is None else params / 1e6, 2)
        body.append([f"{row.name} on {row.backbone}, here", millions, *map(_number, means), "as mean-3"])
    for entry in PUBLISHED:
        means = [*(entry.groups or (None,) * 3), entry.mean_groups, entry.mean_tasks]
        millions = _number(entry.millions, 2)
        body.append([f"{entry.method}, published", millions, *map(_number, means), entry.stricter or _GAP])
    return header, body


def _notes(rows: Sequence[Row], suite: Suite) -> list[str]:
    notes = [
        f"Test accuracy in per cent on {suite.name}. Hyper-parameters were chosen by the last epoch's accuracy on the "
        "validation split after training on the training split (of equals the smaller learning rate); then trained on "
        "both, and the last epoch measured on the test split. Nothing was chosen by a test result."
    ]
    if suite.name != "vtab-1k":
        notes.append(f"{suite.name} is not VTAB-1k: its figures compare methods here, not with published tables.")
    else:
        notes.append(
            "Published figures come from other code, transforms and weights, and some of them from the best epoch on "
            "the test split; the last column has what was found without that, where it is known."
        )
    for row in rows:
        for task, reason in row.failures.items():
            what = "has fewer seeds for" if task in row.scores else "has no result for"
            notes.append(f"{row.name} on {row.backbone} {what} {task}: {reason}")
        never = [task for task in row.missing(suite) if task not in row.failures]
        if never:
            notes.append(f"{row.name} on {row.backbone} was not run on {', '.join(never)}.")
        if row.failed_settings:
            notes.append(f"{row.name} on {row.backbone}: {row.failed_settings} cells of its selections failed.")
    if any(row.missing(suite) for row in rows):
        notes.append("Means are given only where every task they run over is there.")
    return notes


def _runs(results: Results, suite: Suite) -> list[tuple[str, str]]:
    found = dict.fromkeys(line["run"] for line in results.cells() if "run" in line and line["suite"] == suite.name)
    told: dict[str, str] = {}
    for key in found:
        run = results.run(key)
        if run is not None:
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            told[f"{run['command']} | {run['weights']} | {run['preprocessing']} | {versions}"] = key
    return [(key, text) for text, key in told.items()]


def _markdown(suite: Suite, tables: Sequence[tuple[str, Table]], notes: Sequence[str]) -> str:
    parts = [f"# Transfer to {suite.name}", *notes]
    for title, (header, body) in tables:
        lines = [header, ["---"] * len(header), *body]
        parts += [f"## {title}", "\n".join("| " + " | ".join(_md(cell) for cell in line) + " |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _md(cell: str) -> str:
    return cell.replace("|", "\\|")


def _csv(rows: Sequence[Row], suite: Suite) -> str:
    """One line a (backbone, method, task): for further work."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("suite", "group", "task", "backbone", "method", "accuracy_mean", "accuracy_std", "seeds", "samples")
    writer.writerow([*columns, "params_with_head", "params_without_head", "seconds", "peak_memory_mb", "missing"])
    for row in rows:
        for task in suite.tasks:
            score = row.scores.get(task.name)
            about = [suite.name, task.group, task.name, row.backbone, row.name]
            if score is None:
                writer.writerow([*about, *[""] * 8, row.failures.get(task.name, "not run")])
                continue
            values = [round(score.mean, 4), round(score.std, 4), len(score.values), score.samples]
            values += [score.params["with_head"], score.params["without_head"]]
            values += [round(score.seconds, 3), score.peak_memory_mb]
            writer.writerow([*about, *values, row.failures.get(task.name, "")])
    return text.getvalue()


_LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$"}
_LATEX |= {"{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _latex(tables: Sequence[tuple[str, Table]]) -> str:
    """A tabular for each table, for the booktabs package."""

    def escape(cell: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in cell)

    parts = []
    for title, (header, body) in tables:
        lines = [" & ".join(map(escape, line)) + r" \\" for line in (header, *body)]
        inside = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        columns = "l" * len(header)
        parts.append(f"% {title}\n\\begin{{tabular}}{{{columns}}}\n{inside}\n\\end{{tabular}}\n")
    return "\n".join(parts)


def _figures(rows: Sequence[Row], suite: Suite) -> list[tuple[str, Any]]:
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.scores]
    if not drawn:
        return []
    count, width = len(suite.tasks), 0.8 / len(drawn)
    bars = Figure(figsize=(max(7.0, 0.35 * count * (len(drawn) + 1) ** 0.7), 4.0))
    axes = bars.add_subplot()
    for place, row in enumerate(drawn):
        own = [(i, row.scores[task.name]) for i, task in enumerate(suite.tasks) if task.name in row.scores]
        axes.bar(
            [i + (place - (len(drawn) - 1) / 2) * width for i, _ in own],
            [score.mean for _, score in own],
            width,
            yerr=[score.std for _, score in own],
            label=f"{row.method}, {row.backbone}",
        )
    axes.set_xticks(range(count), [task.name for task in suite.tasks], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=7, ncols=2)

    cost = Figure(figsize=(6.0, 4.0))
    axes = cost.add_subplot()
    for row in drawn:
        mean = row.mean_groups(suite)
        if mean is not None:
            axes.scatter([(row.params("with_head") or 0)], [mean])
            axes.annotate(
                row.method, (row.params("with_head") or 0, mean), fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, with head")
    axes.set_ylabel("mean of group means, %")
    figures: list[tuple[str, Any]] = [("Accuracy by task and method, with the standard deviation over seeds", bars)]
    if axes.collections:
        figures.append(("Accuracy against trained parameters", cost))
    return figures
