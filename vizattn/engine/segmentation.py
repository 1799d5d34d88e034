"""Segmentation in the shapes mmengine's Runner calls: losses and predictions of a segmenter, and its metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import Tensor

from vizattn.data.masks import IGNORE_INDEX
from vizattn.errors import VizattnError
from vizattn.heads import Segmenter
from vizattn.heads.inference import predict_map
from vizattn.heads.resize import upsample

__all__ = ["SegmentationMetric", "SegmentationTask", "dice_loss", "inference_options", "iou_of"]


class SegmentationTask(BaseModel):
    """Cross entropy, and dice if asked for, over the logits of a segmenter's heads.

    Args:
        model: Gives logits on a coarser grid; these are resized to the masks, which are as large as the images.
        amp: Compute in bfloat16 autocast, on any device; parameters and losses stay in float32.
        dice: Weight of the dice loss (arXiv:1606.04797) beside the cross entropy.
        auxiliary: Weight of the auxiliary head's cross entropy.
        inference: Arguments of `predict_map`.
    """

    def __init__(
        self,
        model: Segmenter,
        *,
        amp: bool = False,
        dice: float = 0.0,
        auxiliary: float = 0.4,
        inference: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.amp = amp
        self.dice = dice
        self.auxiliary = auxiliary
        self.inference = dict(inference or {})

    def forward(self, inputs: Tensor, labels: Any = None, mode: str = "tensor") -> Any:
        """Of images (B, 3, H, W) and masks (B, H', W').

        ``mode="loss"`` gives the losses, ``"predict"`` class indices (H', W') an image, ``"tensor"`` the logits.
        """
        if mode == "predict":
            size = None if labels is None else tuple(labels.shape[-2:])
            options = {**self.inference, "out_size": size, "model_stride": self.model.stride}
            return [predict_map(self.logits, image, **options) for image in inputs]
        if mode != "loss":
            return self.logits(inputs)
        with self._autocast(inputs):
            both = self.model.auxiliary_head is not None  # torch.compile replaces the plain forward alone
            logits, auxiliary = self.model.forward_auxiliary(inputs) if both else (self.model(inputs), None)
        logits = upsample(logits.float(), self.model.stride, labels.shape[-2:])
        losses = {"loss_decode": _cross_entropy(logits, labels)}
        if self.dice:
            losses["loss_dice"] = self.dice * dice_loss(logits, labels)
        if auxiliary is not None:
            auxiliary = upsample(auxiliary.float(), self.model.auxiliary_head.stride, labels.shape[-2:])
            losses["loss_auxiliary"] = self.auxiliary * _cross_entropy(auxiliary, labels)
        return losses

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, num_classes, h, w) in float32."""
        with self._autocast(inputs):
            return self.model(inputs).float()

    def _autocast(self, inputs: Tensor) -> Any:
        return torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that count; 0 with a gradient where none does."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / (labels != IGNORE_INDEX).sum().clamp(min=1)


def dice_loss(logits: Tensor, labels: Tensor, eps: float = 1.0) -> Tensor:
    """One minus the soft dice coefficient, averaged over classes: logits (B, C, H, W), labels (B, H, W).

    Sums run over the batch, so that a class that is rare in one image counts where it is seen; ignored pixels do not.
    """
    counted = labels != IGNORE_INDEX
    probabilities = logits.softmax(dim=1) * counted[:, None]
    of_label = probabilities.gather(1, labels.masked_fill(~counted, 0)[:, None])[:, 0]
    overlap = logits.new_zeros(logits.shape[1]).index_add(0, labels[counted], of_label[counted])
    total = probabilities.sum(dim=(0, 2, 3)) + labels[counted].bincount(minlength=logits.shape[1])
    return 1 - ((2 * overlap + eps) / (total + eps)).mean()


def inference_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `predict_map` from a recipe: windows are those of training, and overlap by a third.

    Raises:
        VizattnError: Sliding windows of no size.
    """
    options = dict(config["inference"])
    crop, stride = options.pop("crop_size"), options.pop("stride")
    if options["mode"] == "slide":
        crop = pair("inference.crop_size", crop or config["data"]["crop_size"])
        if crop is None:
            raise VizattnError(
                "Sliding windows (inference.mode='slide') need inference.crop_size or data.crop_size, in pixels."
            )
        options["crop_size"] = crop
        options["stride"] = pair("inference.stride", stride) or tuple(max(1, side * 2 // 3) for side in crop)
    return options | {"scales": tuple(options["scales"])}


def pair(name: str, value: Any) -> tuple[int, int] | None:
    """A size in pixels, given as one number or two, as (height, width).

    Raises:
        VizattnError: It is neither.
    """
    if value is None:
        return None
    sides = [value, value] if isinstance(value, int) else list(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise VizattnError(f"Option {name} must be a number of pixels or [height, width], not {value!r}.")
    return sides[0], sides[1]


class SegmentationMetric(BaseMetric):
    """mIoU, mAcc, aAcc and the IoU of each class, from one matrix of counts that is summed over processes.

    Only counts are kept; each process sees its own images once (`vizattn.data.loader.EpochSampler`), so the result does
    not depend on their number.
    """

    default_prefix = ""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        classes = len(self.class_names)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.images = torch.zeros(1, dtype=torch.int64)

    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        """Count one batch: `data_batch` is (inputs, masks (B, H, W)), `data_samples` B maps (H, W) of class indices."""
        for predicted, labels in zip(data_samples, data_batch[1], strict=True):
            self.confusion += confusion(predicted, labels, len(self.class_names))
            self.images += 1

    def evaluate(self, size: int) -> dict[str, Any]:
        """The metrics over all processes, in 0..1; a class that is neither labelled nor predicted is in no mean."""
        counts = torch.cat([self.confusion.flatten(), self.images])
        dist.all_reduce(counts)
        matrix, images = counts[:-1].view_as(self.confusion).double(), int(counts[-1])
        self.reset()
        if not matrix.any():
            raise VizattnError(
                f"There is no labelled pixel in {images} image{'s' * (images != 1)}: nothing to measure."
            )
        iou, accuracy = iou_of(matrix)
        labelled = matrix.sum(1) > 0
        named = {name: None if value.isnan() else value.item() for name, value in zip(self.class_names, iou)}
        return {
            "miou": iou.nanmean().item(),
            "macc": accuracy[labelled].mean().item(),
            "aacc": (matrix.trace() / matrix.sum()).item(),
            "samples": images,
            "iou_per_class": named,
        }

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Unused: `evaluate` sums counts instead of collecting results."""
        raise NotImplementedError


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts (labels, predictions) of two maps (H, W); pixels of `IGNORE_INDEX` are left out."""
    labels, predicted = labels.cpu().long(), predicted.cpu().long()
    counted = labels != IGNORE_INDEX
    places = labels[counted] * num_classes + predicted[counted]
    return torch.bincount(places, minlength=num_classes**2).view(num_classes, num_classes)


def iou_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and accuracy of each class (C,) from counts (C, C); not-a-number where a class never occurs."""
    hits, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return hits / (labelled + predicted - hits), hits / labelled
