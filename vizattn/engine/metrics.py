"""Classification metrics by counting, exact over several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import dist
from mmengine.evaluator import BaseMetric

__all__ = ["ClassificationMetric"]


class ClassificationMetric(BaseMetric):
    """Top-1 and top-5 accuracy, accuracy of each class, and cross entropy.

    Only counts are kept and they are summed over processes, each of which sees its own samples once
    (see `vizattn.data.loader.EpochSampler`): the result does not depend on the number of processes.
    """

    default_prefix = ""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        classes = len(self.class_names)
        self.seen = torch.zeros(classes, dtype=torch.float64)
        self.correct = torch.zeros(classes, dtype=torch.float64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # top-5 hits, summed cross entropy

    def process(self, data_batch: Any, data_samples: Sequence[torch.Tensor]) -> None:
        """Count one batch: `data_batch` is (inputs, labels (B,)), `data_samples` the B rows of logits (classes,)."""
        logits = torch.stack(list(data_samples)).float().cpu()
        labels = data_batch[1].cpu()
        hits = logits.argmax(1) == labels
        classes = len(self.class_names)
        self.seen += torch.bincount(labels, minlength=classes)
        self.correct += torch.bincount(labels[hits], minlength=classes)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.sums[0] += (top5 == labels[:, None]).any(1).sum()
        self.sums[1] += F.cross_entropy(logits.double(), labels, reduction="sum")

    def evaluate(self, size: int) -> dict[str, Any]:
        """The metrics over all processes: accuracies in 0..1, `accuracy_per_class` by class name (None if unseen)."""
        counts = torch.cat([self.seen, self.correct, self.sums])
        dist.all_reduce(counts)
        classes = len(self.class_names)
        seen, correct, (top5, loss) = counts[:classes], counts[classes : 2 * classes], counts[2 * classes :].tolist()
        self.reset()
        total = seen.sum().item()
        per_class = {
            name: hit / count if count else None
            for name, hit, count in zip(self.class_names, correct.tolist(), seen.tolist())
        }
        return {
            "accuracy": correct.sum().item() / total,
            "accuracy_top5": top5 / total,
            "loss": loss / total,
            "samples": int(total),
            "accuracy_per_class": per_class,
        }

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Unused: `evaluate` sums counts instead of collecting results."""
        raise NotImplementedError
