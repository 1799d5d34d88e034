"""The page of measurements and `make bench` have the same runs."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vizattn.bench import GROUPS
from vizattn.bench.rows import read_rows
from vizattn.cli import bench

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "performance"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("measure_performance")


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_intermixed_args(words)


def test_every_result_beside_the_page_is_of_its_run(tool: ModuleType) -> None:
    places = {tool.place(name): run for name, run in tool.RUNS.items()}
    assert {path.relative_to(RESULTS) for path in RESULTS.rglob("*.csv")} == set(places)
    for place, run in places.items():
        [command] = {row.command for row in read_rows(RESULTS / place)}
        assert shlex.split(command)[:2] == ["vizattn", "bench"]
        assert parsed(shlex.split(command)[2:]) == parsed(run.arguments.split()), place


def test_every_table_is_of_a_run(tool: ModuleType) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = {Path(file) for file in re.findall(r"<!-- (?:table|growth): (\S+)", page)}
    assert shown == {tool.place(name) for name in tool.RUNS}


def test_a_run_that_fails_does_not_stop_the_others(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def call(command: list[str]) -> int:
        called.append(command)
        return int("ops" in command and "--only" not in command)

    monkeypatch.setattr(tool.subprocess, "call", call)
    assert tool.main(["--out", "new"]) == 1
    folders = ["new" if name in GROUPS else f"new/{name}" for name in tool.RUNS]
    assert [command[-2:] for command in called] == [["--out", folder] for folder in folders]
    assert all(command[:4] == [sys.executable, "-m", "vizattn", "bench"] for command in called)
    printed, errors = capsys.readouterr()
    assert f"[2/{len(tool.RUNS)}] growth: attention by size\nvizattn bench ops --only vizattn --size 14x14" in printed
    assert errors == "\nFailed, as told above: ops.\n"
    assert tool.main(["fused", "data"]) == 0 and len(called) == len(tool.RUNS) + 2


def test_unknown_runs(tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.subprocess, "call", lambda command: pytest.fail("it measures before it checks"))
    assert tool.main(["ops", "grwoth"]) == 2
    message = capsys.readouterr().err
    assert "Unknown run 'grwoth'. Did you mean 'growth'?" in message and all(name in message for name in tool.RUNS)
