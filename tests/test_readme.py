"""Every block of code in the README runs, in its order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from vizattn.cli import main

ROOT = Path(__file__).parents[1]


class Block(NamedTuple):
    """One fenced block: its language, its text and the line it begins at."""

    language: str
    code: str
    line: int


def fenced_blocks(text: str) -> list[Block]:
    return [
        Block(match[1], match[2], text[: match.start()].count("\n") + 2)
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


BLOCKS = fenced_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
MAKE = [block for block in BLOCKS if block.code.startswith("make ")]
TOUR = [block for block in BLOCKS if block not in MAKE]


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    exec(compile(block.code, f"README.md, block at line {block.line}", "exec"), namespace)


def run_bash(block: Block, folder: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-e", "-c", block.code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"README.md, block at line {block.line}:\n{run.stdout}\n{run.stderr}"


@pytest.mark.timeout(900)  # about a minute on two quiet cores, most of it starting processes
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    ran = []
    for block in TOUR:
        if block.language == "python":
            run_python(block, namespace)
        else:
            run_bash(block, tmp_path)
        ran.append(block.language)
    assert {"python", "bash"} == set(ran)
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


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = [line.split()[1] for block in MAKE for line in block.code.splitlines()]
    assert {"demo", "test"} <= set(named) <= targets
