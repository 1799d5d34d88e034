"""What is trained: a timm model with its loss, in the shape mmengine's Runner calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import nn
from torchvision.transforms import v2

__all__ = ["ClassificationTask", "frozen_features_each"]

Source = Literal["images", "split", "features"]


def frozen_features_each(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Frozen features of a batch, computed image by image: (B, ...) in float32.

    Matrix products may round differently for different batch shapes and numbers of threads. One image at a time, in a
    fresh (aligned) tensor, on one thread, is always the same computation, so an image's features do not depend on the
    batch it came in: this makes training from stored features equal training from images bit for bit. On a CPU the
    threads work on different images instead.
    """
    from vizattn.adapters import frozen_features

    kind = images.device.type
    amp = torch.is_autocast_enabled(kind)  # a state of the thread

    def features_of(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=amp):
            return frozen_features(model, image[None].clone()).float()

    if kind != "cpu":
        return torch.cat([features_of(image) for image in images])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(features_of, images)))
    finally:
        torch.set_num_threads(threads)


class ClassificationTask(BaseModel):
    """Cross entropy over a timm model's logits.

    Args:
        model: Gives logits (B, num_classes) for images (B, C, H, W).
        num_classes: Number of classes.
        source: What `inputs` are: ``"images"``; ``"features"`` of the frozen part, stored before; ``"split"``: images
            that go through the frozen part exactly as stored features do.
        amp: Compute in bfloat16 autocast, on any device; parameters and loss stay in float32.
        mixup: Alpha of mixup (arXiv:1710.09412), 0 for none.
        cutmix: Alpha of CutMix (arXiv:1905.04899), 0 for none; with both, each batch takes one of them at random.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        source: Source = "images",
        amp: bool = False,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.source = source
        self.amp = amp
        self.label_smoothing = label_smoothing
        mixes: list[nn.Module] = []
        if mixup:
            mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            if self.source == "images":
                return self.model(inputs).float()
            from vizattn.adapters import head_from_features

            features = inputs if self.source == "features" else frozen_features_each(self.model, inputs)
            return head_from_features(self.model, features).float()

    def forward(self, inputs: torch.Tensor, labels: Any = None, mode: str = "tensor") -> Any:
        """``mode="loss"`` gives {"loss"}, ``"predict"`` and ``"tensor"`` give logits (B, num_classes)."""
        if mode != "loss":
            return self.logits(inputs)
        targets = labels
        if self.mix is not None:
            inputs, targets = self.mix(inputs, labels)
        logits = self.logits(inputs)
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)}
