"""`vizattn vtab`: what it prints and writes, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vizattn.cli import main
from vizattn.cli.vtab import _seeds
from vizattn.errors import VizattnError

MINI = ["vtab", "run", "--suite", "vtab-mini", "--tasks", "digits", "--adapter"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path / "cache"))


def test_a_run_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--seeds", "1", "--sweep", "lr=0.01,0.001", "--cfg-options", "schedule.epochs=4"]
    assert main([*MINI, "linear_probe", *options]) == 0
    text = capsys.readouterr().out
    assert "Tasks: 1, methods: 1, settings: 2, cells: 3;" in text and "digits, linear_probe, seed 42:" in text
    assert "1 of 8" in text and "797" in text
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    final = next(line for line in lines if line.get("stage") == "final")
    assert final["accuracy"] > 0.6 and final["samples"] == 797  # 94 % after 30 epochs
    run = next(line for line in lines if line["kind"] == "run" and line["id"] == final["run"])
    assert run["weights"] == "vit_va_nano_patch4_32.glyphs" and run["versions"]["torch"]
    assert run["preprocessing"]["crop_mode"] == "squash" and run["config"]["schedule"]["epochs"] == 4

    assert main([*MINI, "linear_probe", *options]) == 0, "and again, with nothing left to do"
    assert len((out / "results.jsonl").read_text().splitlines()) == len(lines)
    capsys.readouterr()
    assert main(["vtab", "report", str(out), "--to", str(tmp_path / "elsewhere")]) == 0
    assert "was not run on photo_crops" in (tmp_path / "elsewhere" / "report.md").read_text()


def test_a_task_without_a_result_is_told_by_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vizattn.engine.vtab import cells

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("not enough")

    monkeypatch.setattr(cells, "train", fail)
    assert main([*MINI, "vpt", "--out", str(tmp_path), "--seeds", "1", "--device", "cpu"]) == 1
    assert "failed: digits, vpt, final, seed 42, {}: MemoryError: not enough" in capsys.readouterr().out


def test_results_of_images_elsewhere_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--seeds", "1", "--sweep", "none", "--cfg-options", "schedule.epochs=4"]
    for root in ("one", "other"):
        assert "are of the images in" not in capsys.readouterr().out
        assert main([*MINI, "linear_probe", *options, "--root", str(tmp_path / root)]) == 0
    told = f"are of the images in {tmp_path / 'one'}; for those in {tmp_path / 'other'} choose another --out"
    assert told in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MINI, "linear_probe", "vpt", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "methods: 2, settings: 41, cells: 50;" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MINI, "vptt"], "Did you mean 'vpt'"),
        (["vtab", "run", "--suite", "vtab-mimi", "--adapter", "vpt"], "Did you mean 'vtab-mini'"),
        (["vtab", "run", "--suite", "vtab-mini", "--tasks", "digit", "--adapter", "vpt"], "Did you mean 'digits'"),
        (["vtab", "run", "--adapter", "vpt", "--root", "nowhere"], "None of the tasks is here"),
        (["vtab", "run", "--adapter", "vpt"], "give --root DIR"),
        ([*MINI, "vpt", "--sweep", "lr"], "--sweep takes NAME=VALUE"),
        ([*MINI, "vpt", "--sweep", "optimizer.lrr=1"], "Did you mean 'optimizer.lr'"),
        ([*MINI, "vpt", "--sweep", "lr=-1,1"], "optimizer.lr must be above 0"),
        ([*MINI, "vpt", "--seeds", "x"], "--seeds takes how many"),
        ([*MINI, "vpt", "--backbone", "vit_va_nano_patch4_23"], "Did you mean 'vit_va_nano_patch4_32'"),
        ([*MINI, "linear_probe", "--cfg-options", "adapter.num_tokens=3"], "num_tokens"),
        ([*MINI, "vpt", "--device", "cpuu"], "Did you mean 'cpu'"),
        ([*MINI, "vpt", "--workers", "0"], "--workers must be at least 1"),
        ([*MINI, "vpt", "--ray", "nowhere:1", "--backbone", "vit_va_nano_patch4_32"], "Ray"),
        (["vtab", "report", "nowhere"], "There are no results in nowhere"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)  # as if it were not installed
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_unknown_options_of_a_part_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*MINI, "vpt", "--worker", "2"])
    assert stopped.value.code == 2 and "--workers" in capsys.readouterr().err


def test_seeds_are_those_of_the_publication_first() -> None:
    assert _seeds("5", "--seeds") == [42, 44, 82, 100, 800]
    assert _seeds("7", "--seeds") == [42, 44, 82, 100, 800, 0, 1]
    assert _seeds("7,9", "--seeds") == [7, 9] and _seeds("1", "--seeds") == [42]
    assert _seeds("7,", "--seeds") == [7] and _seeds("0,", "--seeds") == [0]
    for wrong in ("0", "-1", "1,1", "", "two"):
        with pytest.raises(VizattnError, match="--seeds takes"):
            _seeds(wrong, "--seeds")


def test_a_task_is_missed_where_it_was_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vtab", "check", "--root", str(tmp_path), "--tasks", "caltech101"]) == 1
    assert "caltech101" in capsys.readouterr().out


def test_an_unknown_method_is_told_among_the_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MINI, "lora"]) == 2
    assert "Unknown adapter 'lora'" in capsys.readouterr().err
