"""Results in files, against older ones, and as pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vizattn.bench import Row, compare, draw, read_rows, write_rows
from vizattn.errors import VizattnError

ROW = Row(
    group="ops",
    subject="halo",
    name="vizattn",
    ours=True,
    mode="forward",
    batch=1,
    size="56x56",
    dtype="fp32",
    variant="eager",
    threads=1,
    rounds=5,
    seconds=0.01,
    seconds_low=0.009,
    seconds_high=0.012,
    reference="timm",
    ratio=0.5,
    ratio_low=0.48,
    ratio_high=0.53,
    images_per_second=None,
    gmacs=0.25,
    gflops=50.0,
    peak_gflops=90.0,
    built_mb=4.0,
    run_mb=30.0,
    note="",
    machine="a machine",
    versions="torch 2",
    command="vizattn bench ops --only 'a, b'",
    date="2026-01-01T00:00:00Z",
)
UNIT = replace(ROW, name="timm", ours=False, ratio=1.0, ratio_low=1.0, ratio_high=1.0)
FAILED = replace(ROW, name="natten", seconds=None, ratio=None, note='not "installed", here')


def times(ratio: float) -> Row:
    return replace(ROW, ratio=ratio, ratio_low=0.97 * ratio, ratio_high=1.03 * ratio)


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [ROW, UNIT, FAILED]
    write_rows(rows, tmp_path / "ops.csv")
    assert read_rows(tmp_path / "ops.csv") == rows and [p.name for p in tmp_path.iterdir()] == ["ops.csv"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a result of `vizattn bench`: its columns are nothing"),
        ("case,seconds\nfull,1\n", "its columns are case, seconds"),
        (None, "line 2 is damaged: could not convert string to float: 'fast'"),
    ],
)
def test_other_files_are_told(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "old.csv"
    write_rows([ROW], path)
    path.write_text(path.read_text().replace("0.009", "fast") if text is None else text)
    with pytest.raises(VizattnError, match=message):
        read_rows(path)


@pytest.mark.parametrize("now, verdict", [(0.3, "faster"), (0.49, "same"), (0.8, "slower")])
def test_changes_count_beyond_the_spread(now: float, verdict: str) -> None:
    [change] = compare([times(now)], [times(0.5)])
    assert (change.verdict, change.unit, change.before, change.now) == (verdict, "timm", 0.5, now)


def test_wide_spreads_are_no_change() -> None:
    [change] = compare([replace(times(0.8), ratio_low=0.4)], [times(0.5)])
    assert change.verdict == "same"


def test_seconds_are_compared_on_one_machine_only() -> None:
    slow = replace(UNIT, seconds=0.02, seconds_low=0.019, seconds_high=0.021)
    [change] = compare([slow], [UNIT])
    assert change.verdict == "slower" and change.unit == "seconds"
    changes = compare([slow, times(0.5)], [replace(UNIT, machine="another"), times(0.5)])
    assert [change.row.name for change in changes] == ["vizattn"]


def test_without_a_reference_seconds_are_compared() -> None:
    alone = replace(ROW, ratio=None, ratio_low=None, ratio_high=None)
    for before, now in ((alone, alone), (ROW, alone), (alone, ROW)):
        [change] = compare([replace(now, seconds=0.02, seconds_low=0.019)], [before])
        assert (change.verdict, change.unit, change.before, change.now) == ("slower", "seconds", 0.01, 0.02)


def test_results_without_a_common_case_are_told() -> None:
    with pytest.raises(VizattnError, match="no case in common"):
        compare([ROW], [replace(ROW, size="28x28"), replace(ROW, threads=2)])


@pytest.mark.parametrize("sizes", [["56x56"], ["14x14", "28x28"]], ids=["bars", "growth"])
def test_pictures_name_the_cases(tmp_path: Path, sizes: list[str]) -> None:
    rows = [replace(row, size=size) for size in sizes for row in (ROW, UNIT, FAILED)]
    draw(rows, tmp_path / "ops.svg")
    text = (tmp_path / "ops.svg").read_text()
    assert text.startswith("<?xml") and "halo" in text and "timm" in text and "natten" not in text
    draw([FAILED], tmp_path / "none.svg")
