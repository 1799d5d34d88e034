"""The results file: appended to by many, read through damage, claimed by one at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from vizattn.engine.vtab.results import Results
from vizattn.errors import VizattnError


def line(cell: str, status: str = "done", **more: Any) -> dict[str, Any]:
    return {"kind": "cell", "cell": cell, "status": status, **more}


def test_lines_are_read_once_and_in_order(tmp_path: Path) -> None:
    writer, reader = Results(tmp_path), Results(tmp_path)
    assert reader.read() == []
    writer.append([line("a"), line("b", accuracy=0.5)])
    assert [entry["cell"] for entry in reader.read()] == ["a", "b"]
    writer.append([line("c"), {"kind": "run", "id": "r", "command": "x"}])
    assert [entry["cell"] for entry in reader.read()] == ["c"]
    assert reader.get("b")["accuracy"] == 0.5 and reader.run("r")["command"] == "x"  # type: ignore[index]


def test_a_configuration_is_written_once(tmp_path: Path) -> None:
    run = {"kind": "run", "id": "r"}
    results = Results(tmp_path)
    results.append([run, line("a"), run, line("b")])
    results.read()
    results.append([run, line("c"), {**run, "id": "s"}])
    kinds = [json.loads(text)["kind"] for text in results.path.read_text().splitlines()]
    assert kinds == ["run", "cell", "cell", "cell", "run"]


def test_the_first_done_line_counts(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append([line("a", "failed", reason="x"), line("a", accuracy=1), line("a", accuracy=2)])
    results.append([line("a", "failed", reason="y")])
    results.read()
    assert results.get("a")["accuracy"] == 1  # type: ignore[index]
    assert len(results.cells()) == 1


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_torn_tail_is_left_out_and_written_past(tmp_path: Path, cut: int) -> None:
    results = Results(tmp_path)
    results.append([line("a"), line("b")])
    whole = results.path.read_bytes()
    results.path.write_bytes(whole[:-cut])
    again = Results(tmp_path)
    again.append([line("c")])
    again.read()
    known = {entry["cell"] for entry in again.cells()}
    assert known == ({"a", "b", "c"} if cut == 1 else {"a", "c"})
    assert again.torn == (0 if cut == 1 else 1)


def test_garbage_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append([line("a")])
    with open(results.path, "ab") as file:
        file.write(b"\xff\xfe{\n[]\n{}\n" + json.dumps({"format": 1, "kind": "cell"}).encode() + b"\n")
    results.append([line("b")])
    results.read()
    assert {entry["cell"] for entry in results.cells()} == {"a", "b"} and results.torn == 4


def test_a_changed_digit_is_noticed(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append([line("a", accuracy=0.85), line("b", accuracy=0.5)])
    results.path.write_text(results.path.read_text().replace("0.85", "0.95"))
    results.read()
    assert [entry["cell"] for entry in results.cells()] == ["b"] and results.torn == 1


def test_lines_without_a_checksum_count_if_tables_can_be_made_of_them(tmp_path: Path) -> None:
    about = dict.fromkeys(("suite", "task", "backbone", "method", "row", "stage"), "x") | {
        "setting": {},
        "adapter": None,
        "format": 1,
    }
    measured = {"accuracy": 0.5, "samples": 3, "seconds": 1.0, "peak_memory_mb": 2.0}
    whole = line("a", **about, **measured, params={"with_head": 2, "without_head": 1})
    lacking = [{key: value for key, value in whole.items() if key != name} for name in measured]
    others = [
        {**whole, "params": {"with_head": 2}},
        {**whole, "accuracy": "0.5"},
        {**whole, "setting": None},
        {**whole, "adapter": [3]},
    ]
    for place, entry in enumerate([*lacking, *others]):
        entry["cell"] = str(place)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lacking, whole, *others]))
    results = Results(tmp_path)
    results.read()
    assert [entry["cell"] for entry in results.cells()] == ["a"] and results.torn == 8


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"format": 99, "kind": "cell"}\n')
    with pytest.raises(VizattnError, match="has format 99; this version of vizattn reads up to 1"):
        Results(tmp_path).read()


def _write(folder: str, name: str) -> None:
    for number in range(100):
        Results(folder).append([line(f"{name}{number}", text="x" * 3000)])


def test_processes_append_at_once_and_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), name)) for name in "abc"]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    results = Results(tmp_path)
    assert len(results.read()) == 300 and results.torn == 0


def _hold(folder: str) -> None:
    with Results(folder).claim("unit") as held:
        Path(folder, "held").write_text(str(held))
        time.sleep(60)


def test_a_claim_is_exclusive_and_ends_with_a_killed_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    results = Results(tmp_path)
    with results.claim("unit") as held:
        assert not held
    with results.claim("other") as held:
        assert held
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    with results.claim("unit") as held:
        assert held
