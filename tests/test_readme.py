"""Every block of code in the README runs, in its order, in an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, blocks_of, opened
from PIL import Image

from vizattn.cli import main

README = ROOT / "README.md"
TOUR = [block for block in blocks_of(README) if block.runs]


@pytest.mark.timeout(900)  # a minute of one core
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(README, tmp_path, monkeypatch) as page:
        ran = page.run()
        assert {"python", "bash"} == {block.language for block in ran}
        check_the_exported_file(tmp_path)


def check_the_exported_file(folder: Path) -> None:
    """The example of onnxruntime runs without torch, and gives what `vizattn predict` gives."""
    (example,) = (block.code for block in TOUR if "onnxruntime" in block.code)
    wide = folder / "wide.png"
    Image.new("RGB", (90, 41), "white").save(wide)
    paths = [str(wide), *map(str, sorted(folder.glob("pictures/digit 7/*.png"))[:3])]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm', 'vizattn')))\n"
        f"{example}\nprint(json.dumps([{{k: float(v) for k, v in predict(p).items()}} for p in {paths!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    table = folder / "predicted.json"
    wanted = [
        "--bundle",
        str(folder / "work_dirs/pictures"),
        "--top-k",
        "10",
        "--format",
        "json",
        "--output",
        str(table),
    ]
    assert main(["predict", *paths, *wanted]) == 0
    for shares, row in zip(found, json.loads(table.read_text()), strict=True):
        assert len(row["predictions"]) == len(shares) == 10
        for best in row["predictions"]:
            assert shares[best["class"]] == pytest.approx(best["probability"], abs=2e-5)


def test_the_tour_covers_what_users_do() -> None:
    code = "\n".join(block.code for block in TOUR)
    wanted = ("vizattn list", "create_model(", "attach(", "vizattn train", "vizattn predict", "save_adapter(")
    assert [call for call in (*wanted, "load_adapter(", "merge(") if call not in code] == []
