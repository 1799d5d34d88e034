"""The demonstration, cut down to two methods and one seed."""

from __future__ import annotations

import csv

import pytest

from vizattn.cli import main
from vizattn.engine.demo import METHODS, Row, _judge, table_rows
from vizattn.engine.recipes import list_recipes


def test_every_method_has_a_recipe():
    assert {f"classification/digits_{m}" for m in METHODS} <= set(list_recipes())


def test_demo(tmp_path, capsys):
    methods = ["linear_probe", "efficient_probing"]
    assert main(["demo", "--work-dir", str(tmp_path), "--seeds", "1", "--methods", *methods]) == 0
    out = capsys.readouterr().out
    assert "All 2 bundles reproduce their test accuracy exactly." in out
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [r["method"] for r in rows] == methods
    assert all(float(r["accuracy_mean"]) > 0.8 for r in rows)
    assert [int(r["params_without_head"]) for r in rows] == [0, 8 * 96 + 96 * 96]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 26
    assert "http" not in page and "linear_probe" in page
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert all((tmp_path / m / "adapter_model.safetensors").stat().st_size < 100_000 for m in methods)


def test_unknown_method(tmp_path, capsys):
    assert main(["demo", "--work-dir", str(tmp_path), "--methods", "vtp"]) == 2
    assert "Did you mean 'vpt'" in capsys.readouterr().err


@pytest.mark.parametrize(("accuracy", "note"), [(0.95, ""), (0.9, "does not beat linear_probe"), (0.1, "and scratch")])
def test_an_adapter_that_loses_is_named(accuracy, note):
    def row(method, mean):
        return Row(method, 10, 5, mean, 0.0, mean, 1.0, 100.0, 5.0)

    rows = [row("linear_probe", 0.9), row("vpt", accuracy), row("scratch", 0.5)]
    _judge(rows)
    assert note in rows[1].note and bool(rows[1].note) == bool(note)
    assert table_rows(rows)[1][3] == f"{accuracy:.2%} ± 0.00%"
