"""`vizattn list`."""

from __future__ import annotations

import json

import pytest

import vizattn
from vizattn.cli import main

Capture = pytest.CaptureFixture[str]


def test_backbones_with_parameters_and_weights(capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert all("_va_" in name for name in rows if name.startswith("vit_"))
    assert rows["vit_va_nano_patch4_32"]["input"] == [32, 32]
    assert rows["vit_va_nano_patch4_32"]["weights"] == "packaged"
    assert rows["vit_va_base_patch16_224"]["parameters"] == 86_567_656
    assert rows["vit_va_base_patch16_224"]["licence"] == "apache-2.0"


def test_table_has_a_line_each(capsys: Capture) -> None:
    assert main(["list", "vit_va_nano_patch4"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "parameters", "input", "weights", "licence"]
    assert line.split()[0] == "vit_va_nano_patch4_32" and "32 x 32" in line


@pytest.mark.parametrize("pattern", ["TINY", "vit_va_*tiny*", "*tiny*"])
def test_patterns(pattern: str, capsys: Capture) -> None:
    assert main(["list", pattern, "--json"]) == 0
    assert "vit_va_tiny_patch16_224" in [row["name"] for row in json.loads(capsys.readouterr().out)]


def test_timm_names_are_shown_on_request(capsys: Capture) -> None:
    assert main(["list", "swin_tiny_patch4_window7_224"]) == 2
    assert "Unknown backbone" in capsys.readouterr().err
    assert main(["list", "swin_tiny_patch4_window7_224", "--timm"]) == 0
    assert "swin_tiny_patch4_window7_224" in capsys.readouterr().out


def test_no_match_names_the_closest(capsys: Capture) -> None:
    assert main(["list", "tniy"]) == 2
    assert "Did you mean 'tiny'" in capsys.readouterr().err


def test_adapters(capsys: Capture) -> None:
    assert main(["list", "--adapters", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == vizattn.list_adapters()
    assert rows["apla"]["merges"] and not rows["vpt"]["merges"]
    assert rows["efficient_probing"]["cached"] == "tokens"
    assert all(row["summary"].endswith(".") for row in rows.values())


def test_unknown_adapter(capsys: Capture) -> None:
    assert main(["list", "--adapters", "vtp"]) == 2
    assert "Did you mean 'vpt'" in capsys.readouterr().err
