"""The notebooks: stored without outputs, with code whose names exist; run from top to bottom where there is time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checked import check_python
from documents import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_stored_without_outputs_and_uses_what_exists(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code and [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []
    names = check_python("\n".join("".join(cell["source"]) for cell in code), {}, path.name)
    assert {"vizattn", "timm", "build_dataset", "train", "main"} & names


def test_the_page_names_every_notebook() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if path.name not in page] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    script = ROOT / "tools" / "run_notebooks.py"
    run = subprocess.run(
        [sys.executable, script, path.stem, "--out", tmp_path], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    ran = [cell for cell in cells(tmp_path / path.stem / path.name) if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in ran) and any(cell["outputs"] for cell in ran)
