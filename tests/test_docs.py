"""Every block of code in the pages of docs/ runs, or is checked where it cannot; the navigation names every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import ROOT, blocks_of, opened

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if blocks_of(path))


@pytest.mark.parametrize("path", PAGES, ids=[path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES])
def test_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path, tmp_path, monkeypatch) as page:
        page.run()


def test_the_navigation_names_every_page() -> None:
    """As `mkdocs build --strict` demands, which a run without mkdocs does not notice."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"([\w/-]+\.md)\s*$", nav, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
