"""The page of measurements says what the results beside it say."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from vizattn.bench import Row, read_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("make_performance")


def test_the_page_is_up_to_date(tool: ModuleType) -> None:
    assert tool.main(["--check"]) == 0


def test_a_changed_result_makes_the_page_stale(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "performance.md"
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    page.write_text(text.replace("| neighborhood | ", "| neighborhood | 1", 1), encoding="utf-8")
    monkeypatch.setattr(tool, "PAGE", page)
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == 0 and page.read_text(encoding="utf-8") == text


def row(group: str, name: str, ratio: float | None, **others: object) -> Row:
    """A row of a comparison in which all takes this many seconds."""
    [first, *_] = read_rows(ROOT / "docs" / "performance" / f"{group}.csv")
    changed = replace(first, subject="this", name=name, ratio=ratio, seconds=ratio, gflops=None, run_mb=None)
    return replace(changed, ours=name.startswith("vizattn"), images_per_second=ratio and 1 / ratio, **others)


def test_loading_is_compared_with_the_same_stage(tool: ModuleType) -> None:
    names = {"PIL: decode": 1.0, "vizattn: decode": 0.5, "vizattn: light": 4.0}
    names |= {f"{by}: standard, {n} workers": s for by, s in (("vizattn", 2.0), ("timm", 8.0)) for n in (0, 1)}
    lines = tool.table([row("data", name, seconds) for name, seconds in names.items()]).splitlines()
    assert lines[2:] == [
        "| vizattn: decode | 2.00 | 0.500 PIL: decode |",
        "| vizattn: light | 0.250 |  |",
        "| vizattn: standard, 0 workers | 0.500 | 0.250 timm: standard, 0 workers |",
        "| vizattn: standard, 1 workers | 0.500 | 0.250 timm: standard, 1 workers |",
    ]


def test_a_peer_that_cannot_says_why(tool: ModuleType) -> None:
    rows = [
        row("ops", "vizattn", 0.5, variant="compile", dtype="bf16"),
        row("ops", "full softmax", 1.0, dtype="bf16"),
        row("ops", "timm", None, dtype="bf16", note="maps of another shape"),
        row("ops", "natten", None, dtype="bf16", note="natten is not installed"),
    ]
    *_, line = tool.table(rows).splitlines()
    assert line == "| this, compile, bf16 | 500 | 0.500 full softmax, bf16; timm, bf16: maps of another shape |"


def test_what_has_no_type_has_no_comma(tool: ModuleType) -> None:
    rows = [row("startup", "vizattn --help", 3.0), row("startup", "python", 1.0)]
    assert tool.table(rows).splitlines()[2:] == ["| vizattn --help | 3000 | 3.00 python |"]
