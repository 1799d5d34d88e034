"""`vizattn bench`: what it prints, writes, and makes of an older result."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from vizattn.bench.rows import read_rows, write_rows
from vizattn.cli import bench, main

TINY = ["--only", "agent", "--mode", "forward", "--size", "7x8", "--heads", "1", "--dim", "4", "--rounds", "1"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No further process, an empty folder."""
    monkeypatch.setattr("vizattn.bench.timing.in_child", lambda function, *args: function(*args))
    monkeypatch.chdir(tmp_path)


def run(*options: str) -> int:
    return main(["bench", "ops", *TINY, "--no-memory", "--least-seconds", "0", *options])


def test_writes_a_table_and_a_plot(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert "agent, forward, batch 1, 7x8, fp32, 1 threads" in printed and "of full softmax" in printed
    with open("work_dirs/bench/ops.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ("vizattn", "torch alone", "products alone", "full softmax")
    assert [(row["subject"], row["name"]) for row in rows] == [
        (subject, name) for subject in ("agent", "agent, biased") for name in names
    ]
    assert all(float(row["seconds"]) > 0 and "torch" in row["versions"] for row in rows)
    assert rows[0]["command"] == "vizattn bench ops " + " ".join(TINY) + " --least-seconds 0.0 --no-memory"
    assert Path("work_dirs/bench/ops.svg").stat().st_size > 1000


def test_the_command_of_a_row_is_the_one_given() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = ["backbones", "--model", "nat_tiny", "--size", "56x40", "--variant", "compile", "--threads", "2"]
    assert bench._command(parser.parse_args([*words, "--out", "elsewhere"])) == " ".join(["vizattn", "bench", *words])


def test_against_an_older_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    rows = read_rows(Path("work_dirs/bench/ops.csv"))
    for factor, verdict, status in ((1e3, "faster", 0), (1e-3, "slower", 1)):
        older = [
            type(row)(**{**vars(row), **{key: factor * vars(row)[key] for key in ("ratio", "ratio_low", "ratio_high")}})
            for row in rows
        ]
        write_rows(older, Path("old.csv"))
        capsys.readouterr()
        assert run("--against", "old.csv", "--out", "new") == status
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if line.startswith("agent, vizattn"))
        assert line.endswith(verdict)
        assert "products alone" not in printed.partition("Against old.csv:")[2]  # what others' times do is not told


def test_nothing_is_measured_where_nothing_could_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    for other in (("--threads", "2"), ("--batch", "2"), ("--only", "softmax")):
        capsys.readouterr()
        assert run("--against", "work_dirs/bench/ops.csv", "--out", "new", *other) == 2
        printed = capsys.readouterr()
        assert "has no case of ours in common with this run of ops" in printed.err and not printed.out
    assert not Path("new").exists()


def test_a_failure_of_ours_is_not_passed_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of tune")

    monkeypatch.setattr("vizattn.attention.agent_attention", fail)
    assert run() == 1
    assert "vizattn: RuntimeError: out of tune" in capsys.readouterr().out


def test_lists_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    assert "products alone" in capsys.readouterr().out and not Path("work_dirs").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["opps"], "invalid choice: 'opps'"),
        (["ops", "--size", "56y40"], "'56y40' is neither N nor HxW, whole numbers of at least 1"),
        (["ops", "--size", "4x"], "'4x' is neither N nor HxW"),
        (["ops", "--size", "x4"], "'x4' is neither N nor HxW"),
        (["ops", "--size", "7x8x9"], "'7x8x9' is neither N nor HxW"),
        (["ops", "--size", "0x8"], "'0x8' is neither N nor HxW"),
        (["ops", "--least-seconds", "-1"], "'-1' is not a number of seconds of at least 0"),
        (["ops", "--least-seconds", "nan"], "'nan' is not a number of seconds"),
        (["ops", "--least-seconds", "inf"], "'inf' is not a number of seconds"),
        (["ops", "--least-seconds", "soon"], "'soon' is not a number of seconds"),
        (["ops", "--rounds", "0"], "'0' is not a whole number"),
        (["data", "--model", "nat_tiny"], "The group data has no choice of models; it has batches, sizes."),
        (["ops", "--only", "hallo"], "Unknown subject of ops 'hallo'. Did you mean 'halo'"),
        (
            ["ops", "--only", "nosuch"],
            "natten, neighborhood, 'neighborhood, biased', 'neighborhood, dilated', ",
        ),
        (["ops", "--against", "gone.csv"], "No such file or directory: gone.csv"),
        (["ops", "--modell", "nat_tiny"], "unknown option '--modell'. Did you mean '--model'?"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["bench", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
