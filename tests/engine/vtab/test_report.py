"""The tables: nothing averaged that is not whole, the same numbers in every form."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import pytest

from vizattn.data.transfer import SUITES
from vizattn.engine.vtab.report import published_table, summary_table, task_table, write_reports
from vizattn.engine.vtab.results import Results
from vizattn.engine.vtab.tables import PUBLISHED, rows_of

SUITE = SUITES["vtab-1k"]


def _line(task: Any, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    cell = f"{task.name}-{seed}-{more.get('stage', 'final')}-{more.get('setting', {})}"
    line = {"kind": "cell", "cell": cell, "status": "done", "suite": "vtab-1k", "task": task.name, "group": task.group}
    line |= {"backbone": "vit", "method": "vpt", "row": "r", "adapter": {"method": "vpt", "num_tokens": 5}}
    line |= {"stage": "final", "setting": {"optimizer.lr": 0.1}, "seed": seed, "accuracy": accuracy, "samples": 10}
    line |= {"seconds": 2.0, "peak_memory_mb": 100.0, "params": {"with_head": 30, "without_head": 20, "total": 99}}
    return {**line, "run": "abc", **more}


def _accuracy(place: int, seed: int) -> float:
    return (40 + place + seed) / 100


@pytest.fixture
def results(tmp_path: Path) -> Results:
    found = Results(tmp_path / "out")
    found.append(_line(task, seed, _accuracy(i, seed)) for i, task in enumerate(SUITE.tasks) for seed in (1, 2, 3))
    found.append(
        [
            {
                "kind": "run",
                "id": "abc",
                "command": "vizattn vtab run <x>",
                "weights": "vit.w",
                "preprocessing": {"crop_mode": "squash"},
                "versions": {"torch": "2"},
            }
        ]
    )
    found.read()
    return found


def test_means_and_deviations(results: Results) -> None:
    (row,) = rows_of(results.cells(), SUITE)
    means = [40 + i + 2 for i in range(19)]
    assert row.mean_tasks(SUITE) == pytest.approx(statistics.mean(means))
    groups = [means[:7], means[7:11], means[11:]]
    assert row.mean_groups(SUITE) == pytest.approx(statistics.mean(map(statistics.mean, groups)))
    assert [row.group_mean(SUITE, g) for g in SUITE.groups] == pytest.approx([*map(statistics.mean, groups)])
    assert row.scores["cifar"].std == pytest.approx(1.0) and row.name == "vpt (num_tokens=5)"
    assert (row.params("with_head"), row.params("without_head")) == (30, 20)


def test_a_missing_task_leaves_gaps_not_other_means(tmp_path: Path) -> None:
    results = Results(tmp_path)
    absent = SUITE.task("svhn")
    results.append(_line(task, 1, 0.5) for task in SUITE.tasks if task is not absent)
    results.append([_line(absent, 1, 0.0) | {"status": "failed", "reason": "no images there"}])
    results.read()
    (row,) = rows_of(results.cells(), SUITE)
    assert row.missing(SUITE) == ["svhn"] and row.failures["svhn"] == "no images there"
    assert row.group_mean(SUITE, "natural") is None and row.group_mean(SUITE, "structured") == pytest.approx(50)
    assert row.mean_groups(SUITE) is None and row.mean_tasks(SUITE) is None
    _, body = summary_table([row], SUITE)
    assert body[0][2:7] == ["-", "50.0", "50.0", "-", "-"] and body[0][-1] == "18 of 19"
    write_reports(results, SUITE, tmp_path)
    assert "no result for svhn: no images there" in (tmp_path / "report.md").read_text()


def test_every_form_has_the_same_numbers(results: Results, tmp_path: Path) -> None:
    paths = write_reports(results, SUITE, tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.csv", "report.tex", "report.html"]
    with open(tmp_path / "report.csv", newline="") as file:
        table = [*csv.DictReader(file)]
    assert len(table) == 19
    for i, entry in enumerate(table):
        assert float(entry["accuracy_mean"]) == pytest.approx(42 + i)
        assert f"{42 + i:.1f} ± 1.0 (3)" in (tmp_path / "report.md").read_text()
        assert rf"{42 + i:.1f} $\pm$ 1.0 (3)" in (tmp_path / "report.tex").read_text()
        assert f"{42 + i:.1f} ± 1.0 (3)" in (tmp_path / "report.html").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "vizattn vtab run &lt;x&gt;" in page and page.count("data:image/png;base64") == 2
    assert not any(f"{scheme}://" in page for scheme in ("http", "https"))
    assert r"num\_tokens" in (tmp_path / "report.tex").read_text()


def test_published_figures_stand_below_ours(results: Results) -> None:
    rows = rows_of(results.cells(), SUITE)
    _, body = published_table(rows, SUITE)
    assert len(body) == 1 + len(PUBLISHED) and body[0][0] == "vpt (num_tokens=5) on vit, here"
    for entry in PUBLISHED:
        if entry.groups and entry.mean_groups:
            assert statistics.mean(entry.groups) == pytest.approx(entry.mean_groups, abs=0.1)
    # mean-19 follows from the group means by the numbers of tasks
    for entry in PUBLISHED:
        if entry.groups and entry.mean_tasks:
            weighted = sum(mean * count for mean, count in zip(entry.groups, (7, 4, 8))) / 19
            assert weighted == pytest.approx(entry.mean_tasks, abs=0.15)


def test_only_the_newest_choice_of_hyper_parameters_counts(results: Results) -> None:
    task = SUITE.tasks[0]
    results.append([_line(task, 1, 0.9, setting={"optimizer.lr": 0.5})])
    results.read()
    (row,) = rows_of(results.cells(), SUITE)
    assert row.scores[task.name].values == pytest.approx([90.0]) and len(row.scores[SUITE.tasks[1].name].values) == 3


def test_seeds_that_failed_are_told(results: Results, tmp_path: Path) -> None:
    task = SUITE.tasks[0]
    results.append([_line(task, 9, 0.0, status="failed", reason="out of memory", cell="lost")])
    results.read()
    write_reports(results, SUITE, tmp_path)
    assert f"fewer seeds for {task.name}: 1 of 4 seeds failed: out of memory" in (tmp_path / "report.md").read_text()
    assert "1 of 4 seeds failed" in (tmp_path / "report.csv").read_text()


def test_methods_stand_side_by_side_by_task(results: Results) -> None:
    results.append(
        _line(task, 1, 0.25, row="other", method="hst", adapter={"method": "hst"}, cell=task.name)
        for task in SUITE.tasks
    )
    results.read()
    header, body = task_table(rows_of(results.cells(), SUITE), SUITE)
    assert header[3:] == ["vpt on vit", "hst on vit"]
    assert body[0][2:] == ["10", "42.0 ± 1.0 (3)", "25.0 ± 0.0 (1)"]


def test_rows_of_other_recipes_have_other_names(results: Results) -> None:
    results.append([_line(SUITE.tasks[0], 1, 0.25, row="longer", cell="longer")])
    results.read()
    assert [row.name for row in rows_of(results.cells(), SUITE)] == ["vpt (num_tokens=5)", "vpt #2 (num_tokens=5)"]
