"""The page about a classification run: its figures are those of the run, and it holds all that it shows."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vizattn.engine import classification_report, load_trained, train
from vizattn.engine.build import build_data, set_transforms
from vizattn.engine.charts import line_chart
from vizattn.engine.classification_report import PredictionRecord


class Page(HTMLParser):
    """Rows of the tables by heading, captions of the figures, addresses that are loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.captions: list[str] = []
        self.loaded: list[str] = []
        self.at = self.heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.at = tag
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.at = ""

    def handle_data(self, data: str) -> None:
        if self.at == "h2":
            self.heading = data
        elif self.at in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        elif self.at == "figcaption":
            self.captions.append(data)


def test_the_page_of_a_run(adapter_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = train(adapter_recipe | {"adapter": {"method": "linear_probe"}}, work_dir=tmp_path / "run", quiet=True)
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded) and "http" not in text
    assert text.count("<svg") == 3 and [name for name in ("loss", "learning rate") if f">{name}<" not in text] == []
    test = run.metrics["test"]
    result = dict(page.tables["Result on test"])
    assert result["accuracy"] == f"{test['accuracy']:.2%}" and result["images"] == "15"
    assert "top-5 accuracy" not in result

    # the same, counted from the bundle by hand
    trained = load_trained(tmp_path / "run")
    data = build_data(run.config["data"], ["test"])
    set_transforms(data, trained.preprocessing, run.config)
    items = [data.splits["test"][i] for i in range(15)]
    with torch.no_grad():
        confidence, predicted = trained.model(torch.stack([image for image, _ in items])).softmax(1).max(1)
    labels = [label for _, label in items]
    counts = [[sum(y == i and p == j for y, p in zip(labels, predicted)) for j in range(3)] for i in range(3)]
    matrix = page.tables["What is taken for what"][:4]
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]] == counts
    for name, images, recall, *_ in page.tables["Each class"][1:]:
        assert images == "5" and recall == f"{test['accuracy_per_class'][name]:.2%}"
    wrong = sorted(((-c, i) for i, (c, p, y) in enumerate(zip(confidence.tolist(), predicted, labels)) if p != y))
    assert len(page.captions) == len(wrong)
    for caption, (sure, i) in zip(page.captions, wrong):
        name = Path(data.splits["test"].paths[i]).name
        guess, label = run.class_names[predicted[i]], run.class_names[labels[i]]
        assert caption == f"{name}: {guess} ({-sure:.0%}), is {label}"

    about = dict(page.tables["Adapter"])
    assert about["linear_probe merges"] == "yes" and about["trained, without the head"] == "0"
    assert dict(page.tables["How"])["seed"] == "0"
    assert json.loads(re.search(r"<pre>(.*)</pre>", text, re.S)[1].replace("&quot;", '"'))["task"] == "classification"  # type: ignore[index]


def test_a_run_can_do_without(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["schedule"] = {"epochs": 1}
    train(recipe, work_dir=tmp_path / "run", quiet=True, report=False)
    assert not (tmp_path / "run" / "report.html").exists()


def test_names_are_text(tmp_path: Path) -> None:
    """Also those of many classes, where only pairs that occur are shown."""
    record = PredictionRecord()
    record.process((None, torch.tensor([0, 0, 1, 39])), [torch.eye(40)[i] for i in (0, 1, 1, 0)])
    record.evaluate(4)
    names = ["<script>", *map(str, range(1, 40))]
    found = {(0, 0): 1, (0, 1): 1, (1, 1): 1, (39, 0): 1}
    classes = Page("<h2>x</h2>" + classification_report._classes(found, names)).tables["x"]
    assert classes[1] == ["39", "1", "0.00%", "-", "0.00%"] and classes[2] == [
        "<script>",
        "2",
        "50.00%",
        "50.00%",
        "50.00%",
    ]
    assert classes[3] == ["1", "1", "100.00%", "50.00%", "66.67%"] and classes[4] == ["2", "0", "-", "-", "-"]
    pairs = Page("<h2>x</h2>" + classification_report._pairs(found, names)).tables["x"]
    assert pairs[1:] == [["<script>", "1", "1"], ["39", "<script>", "1"]]
    assert "<script>" not in classification_report._matrix(found, names)
    assert record.labels.tolist() == [0, 0, 1, 39] and record.predicted.tolist() == [0, 1, 1, 0]


def test_records_of_several_processes_are_in_the_order_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, shares = torch.arange(7) % 3, []
    for rank in range(2):
        record = PredictionRecord()
        for batch in labels[rank::2].split(2):
            record.process((None, batch), [torch.eye(3)[label] * 9 for label in batch])
        shares.append(torch.cat(record.rows))
    monkeypatch.setattr(classification_report, "dist", SimpleNamespace(all_gather_object=lambda rows: shares))
    record.evaluate(7)
    assert record.labels.tolist() == record.predicted.tolist() == labels.tolist()
    assert record.confidence.min() > 0.99 and record.rows == []


def test_charts() -> None:
    chart = line_chart([(0, 1.0), (10, 3.0), (20, float("nan")), (30, 2.0)], "a < b")
    places = [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]*)"', chart)[1].split()]  # type: ignore[index]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx((x2 - x0) / 3, abs=0.11) and y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.11)
    assert "a &lt; b" in chart and chart.count("<circle") == 3
    assert line_chart([], "none") == "" and "<polyline" in line_chart([(5, 0.0)], "one")
    for low, high in ((0, 1), (-3e-7, 8e9), (0.901, 0.9015), (7, 7)):
        assert 2 <= line_chart([(0, low), (1, high)], "t").count("<line ") <= 6
