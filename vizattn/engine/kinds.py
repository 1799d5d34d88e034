"""What the two tasks differ in: how a model is built, what goes in, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import nn

from vizattn.engine import classification_report, segmentation_report
from vizattn.engine.metrics import ClassificationMetric
from vizattn.engine.models import build_model, build_segmenter
from vizattn.engine.run_report import Measured
from vizattn.engine.segmentation import SegmentationMetric, SegmentationTask, inference_options, pair
from vizattn.engine.task import ClassificationTask, Source

__all__ = ["KINDS", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """One task."""

    best: str
    """The validation metric by which the best checkpoint is chosen; the higher the better."""
    title: str
    """What `best` is called in a line of text."""
    build_model: Callable[[Mapping[str, Any], int], nn.Module]
    """From a resolved recipe and the number of classes."""
    build_task: Callable[[nn.Module, Mapping[str, Any], int, Source], BaseModel]
    """From the model, the recipe, the number of classes, and what the loader gives."""
    build_metric: Callable[[Sequence[str]], BaseMetric]
    """From the names of the classes."""
    build_transform: Callable[[Mapping[str, Any], Mapping[str, Any], bool], Any]
    """From the preprocessing, the recipe's data section, and whether it is for training."""
    eval_batch_size: Callable[[Mapping[str, Any]], int]
    """Images at a time without gradients, from the recipe's data section."""
    report: Callable[[Path, Any, Measured], None]
    """Writes a page about a run to a path, from what `train` gives and the split that was measured last."""
    record: Callable[[], BaseMetric] | None = None
    """Keeps, while that split is measured, what the page needs of it."""


def _classification_task(model: nn.Module, config: Mapping[str, Any], num_classes: int, source: Source) -> BaseModel:
    return ClassificationTask(model, num_classes, source=source, amp=config["amp"] == "bf16", **config["loss"])


def _classification_transform(preprocessing: Mapping[str, Any], data: Mapping[str, Any], train: bool) -> Any:
    from vizattn.data import build_transforms

    return build_transforms(dict(preprocessing), train=train, augment=data["augment"])


def _segmentation_task(model: Any, config: Mapping[str, Any], num_classes: int, source: Source) -> BaseModel:
    return SegmentationTask(model, amp=config["amp"] == "bf16", inference=inference_options(config), **config["loss"])


def _segmentation_transform(preprocessing: Mapping[str, Any], data: Mapping[str, Any], train: bool) -> Any:
    from vizattn.data.segmentation_transforms import build_segmentation_transforms

    return build_segmentation_transforms(
        dict(preprocessing),
        train=train,
        augment=data["augment"],
        crop_size=pair("data.crop_size", data["crop_size"]),
        short_side=data["short_side"],
    )


KINDS: dict[str, Kind] = {
    "classification": Kind(
        best="accuracy",
        title="accuracy",
        build_model=build_model,
        build_task=_classification_task,
        build_metric=ClassificationMetric,
        build_transform=_classification_transform,
        eval_batch_size=lambda data: max(64, data["batch_size"]),
        report=classification_report.write_report,
        record=classification_report.PredictionRecord,
    ),
    "segmentation": Kind(
        best="miou",
        title="mIoU",
        build_model=build_segmenter,
        build_task=_segmentation_task,
        build_metric=SegmentationMetric,
        build_transform=_segmentation_transform,
        eval_batch_size=lambda data: 1,  # images of any size
        report=segmentation_report.write_report,
    ),
}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The task of a resolved recipe."""
    return KINDS[config["task"]]
