"""`vizattn list`."""

from __future__ import annotations

import json
from typing import Any

import pytest

import vizattn
from vizattn.cli import main
from vizattn.cli.backbones import build_empty, costs, gmacs, our_names, parameters

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
    assert header.split() == ["name", "parameters", "gmacs", "input", "weights", "licence"]
    assert line.split()[0] == "vit_va_nano_patch4_32" and "32 x 32" in line


def listed(capsys: Capture, *options: str) -> list[dict[str, Any]]:
    assert main(["list", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_name_has_counts_and_nothing_is_built(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("timm.create_model", build)
    rows = listed(capsys)
    assert [row["name"] for row in rows] == our_names() and set(costs()) == set(our_names())
    assert all(row["parameters"] > 0 and row["gmacs"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["biformer_nano", "efficientvit_va_m0", "halonet_va_nano", "nat_nano"])
def test_counts_are_those_of_a_new_model(name: str) -> None:
    model: Any = build_empty(name)
    assert costs()[name]["parameters"] == parameters(model)
    assert costs()[name]["gmacs"] == pytest.approx(gmacs(model, model.default_cfg["input_size"]), abs=1e-6)


def test_filters(capsys: Capture) -> None:
    assert {row["name"] for row in listed(capsys, "--family", "agent")} >= {"agent_swin_tiny", "deit_agent_base"}
    assert {row["weights"] for row in listed(capsys, "--weights", "none")} == {"none"}
    packaged = [row["name"] for row in listed(capsys, "--weights", "packaged")]
    assert "vit_va_nano_patch4_32" in packaged and "vit_va_tiny_patch16_224" not in packaged
    small = listed(capsys, "--max-params", "10M", "--max-gmacs", "0.3", "--weights", "released")
    assert [row["name"] for row in small] == [f"efficientvit_va_m{i}" for i in range(5)]
    assert len(listed(capsys, "--max-params", "2.5m", "--family", "efficientvit")) == 2


@pytest.mark.parametrize(("sort", "key"), [("params", "parameters"), ("gmacs", "gmacs"), ("name", "name")])
def test_sorting(sort: str, key: str, capsys: Capture) -> None:
    values = [row[key] for row in listed(capsys, "--sort", sort)]
    assert values == sorted(values) and len(set(values)) > 20


def test_sorted_with_timm_the_uncounted_come_last(capsys: Capture) -> None:
    rows = listed(capsys, "--timm", "--sort", "params", "*halonet*")
    assert [row["parameters"] is None for row in rows] == sorted(row["parameters"] is None for row in rows)
    assert {"halonet_va_h0", "halonet26t"} <= {row["name"] for row in rows}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--family", "natt"], "Unknown family 'natt'. Did you mean 'nat'"),
        (["--max-gmacs", "0.0001"], "No backbone is all of this"),
        (["--timm", "--max-params", "1M"], "--max-params does not go with --timm"),
        (["--adapters", "--weights", "none"], "--weights does not go with --adapters"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: Capture) -> None:
    assert main(["list", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", ["10X", "M", "-1", "0", "nan"])
def test_a_limit_that_is_no_number(number: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["list", f"--max-params={number}"])
    assert f"'{number}' is not a positive number" in capsys.readouterr().err


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


def test_recipes_are_listed_with_what_they_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--recipes", "digits_vpt", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["recipe"] == "classification/digits_vpt" and "prompts" in row["what"].lower()
    assert main(["list", "--recipes", "--sort", "params"]) == 2
    assert "--sort does not go with --recipes" in capsys.readouterr().err
    assert main(["train", "digits_vtp"]) == 2
    assert "vizattn list --recipes" in capsys.readouterr().err
