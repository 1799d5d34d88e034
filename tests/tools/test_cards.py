"""The model cards and the index of the zoo follow from what is registered and measured."""

from __future__ import annotations

import html.parser
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import vizattn
from vizattn.cli.backbones import our_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def tools_are_importable() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def backbones() -> list[Any]:
    import zoo

    return zoo.read_zoo()


@pytest.fixture(scope="module")
def cards(backbones: list[Any]) -> dict[str, str]:
    import cards
    import zoo

    return {family: cards.card(family, members) for family, members in zoo.families(backbones).items()}


def section(card: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def test_metadata_is_the_hubs(cards: dict[str, str]) -> None:
    licences = {}
    for family, card in cards.items():
        _, front, _ = card.split("---\n", 2)
        data = yaml.safe_load(front)
        assert data["library_name"] == "timm" and data["pipeline_tag"] == "image-classification"
        assert {"timm", "vizattn"} < set(data["tags"]) and any(tag.startswith("arxiv:") for tag in data["tags"])
        licences[family] = data["license"]
        if data["license"] == "other":
            assert re.fullmatch(r"[a-z0-9.-]+", data["license_name"]) and data["license_link"].startswith("https://")
    assert licences["nat"] == "mit" and licences["agent"] == "other" and licences["halonet"] == "apache-2.0"


def test_every_name_and_its_weights_are_in_its_card(backbones: list[Any], cards: dict[str, str]) -> None:
    assert {backbone.name for backbone in backbones} == set(our_names())
    for backbone in backbones:
        assert f"| `{backbone.name}` | {backbone.input} |" in section(cards[backbone.family], "Sizes")
        for weights in backbone.weights:
            assert f"| `{weights.name}` |" in section(cards[backbone.family], "Weights and published accuracy")


def test_measured_and_published_are_told_apart(cards: dict[str, str]) -> None:
    sizes = section(cards["halonet"], "Sizes")
    header = sizes.splitlines()[0]
    assert "GMACs, counted here" in header and "GMACs, published" in header
    row = next(line for line in sizes.splitlines() if "halonet_va_h7" in line)
    assert [cell.strip() for cell in row.split("|")[3:7]] == ["67.43", "110.70", "67.4", "119.6"]
    assert "None of these was measured here" in section(cards["nat"], "Weights and published accuracy")
    assert "UPerNet 47.1 / 48.4" in cards["nat"] and "SemanticFPN 40.18" in cards["agent"]


def test_weights_without_a_licence_are_named(cards: dict[str, str]) -> None:
    licence = section(cards["agent"], "Licence")
    assert "none stated" in licence and "Nothing of theirs is hosted here" in licence
    assert "Nothing of theirs" not in "".join(card for family, card in cards.items() if family != "agent")
    assert "cc-by-nc-4.0" in section(cards["vit"], "Licence")


def test_citations_name_the_papers_of_the_registry(cards: dict[str, str]) -> None:
    for family, number in {"nat": "2204.07143", "biformer": "2303.08810", "l2vit": "2501.16182"}.items():
        assert f"eprint = {{{number}}}" in section(cards[family], "Citation")
    assert cards["vit"].count("@misc{") == 5


def test_limits_are_told_by_every_card(cards: dict[str, str]) -> None:
    assert all("- " in section(card, "Limits") for card in cards.values())


def test_snippets_run(cards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    built = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: built.append((name, options)))
    for card in cards.values():
        exec(re.findall(r"```python\n(.*?)```", section(card, "Use"), re.DOTALL)[0], {})
    assert len(built) == 2 * len(cards) and {name for name, _ in built} <= set(our_names())


def test_new_rows_appear(backbones: list[Any]) -> None:
    import cards
    import results
    import zoo

    made = results.measured("nat_nano.glyphs", "glyphs accuracy test", 12.5, "%", "vizattn eval X")
    speed = results.measured("nat_tiny", "throughput ratio to resnet50", 0.375, "x", "python tools/measure_zoo.py")
    rows = [row for row in results.read_results() if "accuracy" not in row.metric and "throughput" not in row.metric]
    nat = zoo.families(zoo.read_zoo([*rows, made, speed]))["nat"]
    measured = section(cards.card("nat", nat), "Measured here")
    assert "| `nat_nano.glyphs` | glyphs accuracy test | 12.5 % | `vizattn eval X` |" in measured
    assert "not measured yet" not in measured
    assert "| 0.38 |" in next(
        line for line in section(cards.card("nat", nat), "Sizes").splitlines() if "| `nat_tiny`" in line
    )
    without = zoo.families(zoo.read_zoo(rows))["vit"]
    assert "Accuracy of `vit_va_nano_patch4_32.glyphs`: not measured yet." in cards.card("vit", without)


def test_an_uncounted_backbone_is_named() -> None:
    import results
    import zoo

    rows = [row for row in results.read_results() if row.name != "nat_tiny"]
    with pytest.raises(vizattn.VizattnError, match="multiply-adds of nat_tiny: run"):
        zoo.read_zoo(rows)


def test_a_family_without_a_text_has_a_card_of_its_docstring(backbones: list[Any]) -> None:
    import cards
    import zoo

    card = cards.card("unwritten", zoo.families(backbones)["biformer"])
    assert "# BiFormer (`biformer_*`)\n\nBiFormer: a pyramid" in card


def test_the_newest_row_of_a_kind_counts(tmp_path: Path) -> None:
    import results

    table = tmp_path / "results.csv"
    for value in (1.0, 2.5):
        results.append_results([results.measured("nat_nano", "gmacs", value, "G", "a, b")], table)
    rows = results.read_results(table)
    assert [row.value for row in rows] == [1.0, 2.5] and rows[0].command == "a, b"
    assert results.newest(rows)["nat_nano", "gmacs"].value == 2.5
    table.write_text(table.read_text().replace("2.5", "fast"))
    with pytest.raises(ValueError, match="row 3 is damaged"):
        results.read_results(table)


def test_check_names_what_is_stale(backbones: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import make_cards
    import zoo_index

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["make_cards.py", "--root", str(tmp_path), *options])
        return make_cards.main()

    wanted, points = make_cards.pages(backbones), zoo_index.plot_points(backbones)
    assert run("--check") == 1
    assert run() == 0
    assert make_cards.stale(tmp_path, wanted, points) == [] and run("--check") == 0
    again = (tmp_path / make_cards.PLOT).read_bytes()
    assert run() == 0 and (tmp_path / make_cards.PLOT).read_bytes() == again

    card = tmp_path / "model_cards" / "nat.md"
    card.write_text(card.read_text().replace("| 27.90 |", "| 27.80 |", 1))
    (tmp_path / "model_cards" / "lost.md").write_text("")
    found = make_cards.stale(tmp_path, wanted, points[1:])
    assert any(line.startswith("model_cards/nat.md: -") and "27.80" in line for line in found)
    assert "model_cards/accuracy.svg: other points" in found and "model_cards/lost.md: no such family" in found
    assert run("--check") == 1


def test_plot_has_the_published_points(backbones: list[Any]) -> None:
    import zoo_index

    points = {point["name"]: point for point in zoo_index.plot_points(backbones)}
    assert points["nat_tiny.in1k"]["top1"] == 83.2 and not points["nat_tiny.in1k"]["more_data"]
    assert points["l2vit_base.in22k_ft_in1k"]["more_data"] and points["l2vit_base.in22k_ft_in1k"]["series"] == "l2vit"
    assert points["dinat_large_384.in22k_ft_in1k"]["series"] == "dinat"


class Table(html.parser.HTMLParser):
    """Counts the cells of each row, and what comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1
        self.elsewhere += [value or "" for key, value in attrs if key == "src" or (value or "").startswith("http")]


def test_html_index_is_self_contained(backbones: list[Any]) -> None:
    import zoo_index

    table = Table()
    table.feed(zoo_index.index_html(backbones))
    assert len(table.rows) == len(backbones) + 1 and set(table.rows) == {8} and table.elsewhere == []
