"""Every block of code in the pages of docs/ runs, or is checked where it cannot; the navigation names every page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from documents import ROOT, blocks_of, is_slow, opened

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if blocks_of(path))


def rows(paths: list[Path], *marks: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(p, id=p.relative_to(DOCS).with_suffix("").as_posix(), marks=marks) for p in paths]


FAST, SLOW = ([path for path in PAGES if is_slow(path) == wanted] for wanted in (False, True))


@pytest.mark.timeout(900)  # for machines that others use, too
@pytest.mark.parametrize("path", rows(FAST) + rows(SLOW, pytest.mark.slow))
def test_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path, tmp_path, monkeypatch) as page:
        page.run()


@pytest.mark.parametrize("path", rows(SLOW))
def test_a_page_that_takes_long_is_checked(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path, tmp_path, monkeypatch) as page:
        page.check()


def test_the_navigation_names_every_page() -> None:
    """As `mkdocs build --strict` demands, which a run without mkdocs does not notice."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"([\w/-]+\.md)\s*$", nav, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_pictures_are_what_the_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    diagrams = importlib.import_module("make_diagrams").diagrams()
    there = {path: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    stale = [path.name for path in {*diagrams, *there} if diagrams.get(path) != there.get(path)]
    assert not stale, "run python tools/make_diagrams.py"


def test_every_picture_is_shown_and_all_are_small() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    drawn = list((DOCS / "pictures").glob("*.svg"))
    assert drawn and [path.name for path in drawn if f"pictures/{path.name})" not in text] == []
    assert sum(path.stat().st_size for path in DOCS.rglob("*") if path.suffix in (".svg", ".png")) < 1_000_000
