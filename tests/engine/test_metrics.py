"""Counts against a naive count, and over split data."""

from __future__ import annotations

import pytest
import torch

from vizattn.engine.metrics import ClassificationMetric


@pytest.mark.parametrize("classes", [3, 12])
def test_metrics_are_a_naive_count(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(97, classes, generator=generator)
    labels = torch.randint(0, classes - 1, (97,), generator=generator)
    metric = ClassificationMetric([f"c{i}" for i in range(classes)])
    for part in torch.arange(97).split(10):
        metric.process((None, labels[part]), list(logits[part]))
    result = metric.evaluate(97)

    hits, top5 = [], []
    for row, label in zip(logits.tolist(), labels.tolist()):
        order = sorted(range(classes), key=lambda k: -row[k])
        hits.append(order[0] == label)
        top5.append(label in order[:5])
    assert result["accuracy"] == sum(hits) / 97
    assert result["accuracy_top5"] == sum(top5) / 97
    assert result["samples"] == 97
    for k in range(classes):
        of_class = [hit for hit, label in zip(hits, labels.tolist()) if label == k]
        expected = sum(of_class) / len(of_class) if of_class else None
        assert result["accuracy_per_class"][f"c{k}"] == expected
    naive = -torch.log_softmax(logits.double(), 1)[range(97), labels].mean().item()
    assert result["loss"] == pytest.approx(naive, rel=1e-12)


def test_metrics_start_anew_after_each_evaluation() -> None:
    metric = ClassificationMetric(["a", "b"])
    metric.process((None, torch.tensor([0])), [torch.tensor([1.0, 0.0])])
    assert metric.evaluate(1)["accuracy"] == 1.0
    metric.process((None, torch.tensor([0])), [torch.tensor([0.0, 1.0])])
    assert metric.evaluate(1)["accuracy"] == 0.0
