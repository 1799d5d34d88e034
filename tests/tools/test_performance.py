"""The page of measurements says what the results beside it say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("make_performance")


def test_the_page_is_up_to_date(tool: object) -> None:
    assert tool.main(["--check"]) == 0  # type: ignore[attr-defined]


def test_a_changed_result_makes_the_page_stale(tool: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    page.write_text(text.replace("| neighborhood | ", "| neighborhood | 1", 1), encoding="utf-8")
    monkeypatch.setattr(tool, "PAGE", page)
    assert tool.main(["--check"]) == 1  # type: ignore[attr-defined]
    assert tool.main([]) == 0 and page.read_text(encoding="utf-8") == text  # type: ignore[attr-defined]
