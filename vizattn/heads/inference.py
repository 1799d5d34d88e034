"""Class indices for images of any size: in one piece or by sliding windows, with test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vizattn.errors import VizattnError, unknown

__all__ = ["predict_logits", "predict_map"]

Model = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> logits (B, C, h, w), each over a square of pixels, from the upper left corner on."""

BAND = 2**20
"""Logits that exist at once at the resolution of the result."""


@torch.no_grad()
def predict_map(
    model: Model,
    image: Tensor,
    *,
    out_size: tuple[int, int] | None = None,
    mode: str = "whole",
    crop_size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    batch_size: int = 4,
    model_stride: int | None = None,
) -> Tensor:
    """The class of each pixel.

    Logits are resized (bilinear), compared and dropped in bands of rows. With test-time augmentation, the probabilities
    of all views are averaged at the resolution of the result. Memory, beside the model's own, is that of the logits on
    their own grids, 4 * C * H * W / model_stride^2 bytes a view: 450 MB for 4000 x 3000 pixels, 150 classes, stride 4.

    Args:
        model: In evaluation mode.
        image: Normalised, (3, H, W).
        out_size: Height and width of the result; default those of the image.
        mode: ``"whole"``, or ``"slide"``: windows of `crop_size` at steps of `stride`.
        crop_size: Height and width of the windows in pixels, rounded down to the model's stride.
        stride: Steps of the windows in pixels, down and across, rounded down to the model's stride.
        flip: Add the mirrored image.
        scales: Sizes of the image, relative to its own; each is resized, and predicted as `mode` says.
        batch_size: Windows in one forward pass.
        model_stride: Pixels a logit; default ``model.stride``. If the model has none either, its logits are taken to
            cover the image exactly, also where the image is no multiple of the stride.

    Returns:
        (out_h, out_w), uint8 up to 255 classes, else int16.

    Raises:
        VizattnError: an unknown mode, no or impossible windows, scales that are not positive, no single image.
    """
    if image.ndim != 3:
        raise VizattnError(f"Prediction takes one image (3, H, W), got a tensor of shape {tuple(image.shape)}.")
    if not scales or not all(isinstance(scale, int | float) and 0 < scale <= 100 for scale in scales):
        raise VizattnError(f"Scales of test-time augmentation must be positive and at most 100, got {tuple(scales)}.")
    size = (image.shape[1], image.shape[2])
    out_size = out_size or size
    model_stride = model_stride or getattr(model, "stride", None)
    views = []
    for scale in scales:
        scaled = _scaled(image, scale)
        for flipped in (False, True) if flip else (False,):
            logits = predict_logits(
                model,
                scaled.flip(-1) if flipped else scaled,
                mode=mode,
                crop_size=crop_size,
                stride=stride,
                batch_size=batch_size,
                model_stride=model_stride,
            )
            sides = scaled.shape[-2:] if model_stride else logits.shape[-2:]
            views.append((logits, [side / (model_stride or 1) for side in sides], flipped))

    classes = views[0][0].shape[0]
    result = torch.empty(out_size, dtype=torch.uint8 if classes <= 255 else torch.int16, device=image.device)
    rows = max(1, BAND // (classes * out_size[1]))
    for top in range(0, out_size[0], rows):
        bottom = min(top + rows, out_size[0])
        bands = (_band(logits, covering, out_size, top, bottom, flipped) for logits, covering, flipped in views)
        if len(views) == 1:
            total = next(bands)
        else:
            total = next(bands).softmax(dim=0)
            for band in bands:
                total += band.softmax(dim=0)
        result[top:bottom] = total.argmax(dim=0)
    return result


@torch.no_grad()
def predict_logits(
    model: Model,
    image: Tensor,
    *,
    mode: str = "whole",
    crop_size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    batch_size: int = 4,
    model_stride: int | None = None,
) -> Tensor:
    """Logits (C, h, w) of one image (3, H, W) on the model's own grid, in float32; arguments as of `predict_map`.

    Windows begin at multiples of the model's stride, so that their logits lie on one grid, and are averaged there: a
    model without context gives the same as in one piece. Windows at the right and lower border may be smaller than
    `crop_size`, by less than the model's stride; all are as small as the image where that is smaller.

    Raises:
        VizattnError: an unknown mode, no or impossible windows, a model whose stride does not show.
    """
    if mode not in ("whole", "slide"):
        raise unknown("mode of inference", mode, ("whole", "slide"))
    height, width = image.shape[-2:]
    unit = model_stride or getattr(model, "stride", None)
    if mode == "whole":
        return _forward(model, image[None], unit)[0]
    if not crop_size or not stride or min(*crop_size, *stride) < 1:
        raise VizattnError(
            f"Sliding windows need crop_size and stride, (height, width) in pixels, got {crop_size} and {stride}."
        )
    if stride[0] > crop_size[0] or stride[1] > crop_size[1]:
        raise VizattnError(f"Windows of {crop_size} pixels leave gaps at steps of {stride}: take smaller steps.")
    crop = (min(crop_size[0], height), min(crop_size[1], width))
    if crop == (height, width):
        return _forward(model, image[None], unit)[0]
    unit = unit or _observed_stride(model, image, crop)

    grid = (-(-height // unit), -(-width // unit))
    mean: Tensor | None = None
    seen = torch.zeros(grid, device=image.device)
    for boxes in _batches(_windows((height, width), crop_size, stride, unit), batch_size):
        windows = torch.stack([image[:, top:bottom, left:right] for top, left, bottom, right in boxes])
        batch = _forward(model, windows, unit)
        if mean is None:
            mean = batch.new_zeros(batch.shape[1], *grid)
        for (top, left, _, _), logits in zip(boxes, batch, strict=True):
            rows = slice(top // unit, top // unit + logits.shape[1])
            columns = slice(left // unit, left // unit + logits.shape[2])
            seen[rows, columns] += 1
            # A running mean: equal logits stay what they are, where a sum and a division would round.
            mean[:, rows, columns].lerp_(logits, seen[rows, columns].reciprocal())
    assert mean is not None
    return mean


def _forward(model: Model, images: Tensor, unit: int | None) -> Tensor:
    """Logits in float32, on the grid that the model's stride promises."""
    logits = model(images).float()
    (height, width), (h, w) = images.shape[-2:], logits.shape[-2:]
    if unit and (h, w) != (-(-height // unit), -(-width // unit)):
        raise VizattnError(
            f"An image of {height}x{width} pixels gave {h}x{w} logits, where a model of stride {unit} gives "
            f"{-(-height // unit)}x{-(-width // unit)}."
        )
    return logits


def _scaled(image: Tensor, scale: float) -> Tensor:
    """An image (3, H, W), resized."""
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=scale < 1)[0]


def _windows(
    size: tuple[int, int], crop: tuple[int, int], step: tuple[int, int], unit: int
) -> list[tuple[int, int, int, int]]:
    """Windows (top, left, bottom, right) that cover an image, those of one size after each other."""
    axes = []
    for side, length, distance in zip(size, crop, step):
        length, distance = (max(x // unit * unit, unit) for x in (length, distance))
        last = max(-(-(side - length) // unit) * unit, 0)
        axes.append([(start, min(start + length, side)) for start in [*range(0, last, distance), last]])
    boxes = [(top, left, bottom, right) for top, bottom in axes[0] for left, right in axes[1]]
    return sorted(boxes, key=lambda box: (box[0] - box[2], box[1] - box[3]))


def _batches(boxes: list[tuple[int, int, int, int]], batch_size: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Up to `batch_size` windows of one size at a time."""
    batch: list[tuple[int, int, int, int]] = []
    for box in boxes:
        if batch and (len(batch) == batch_size or _shape(box) != _shape(batch[0])):
            yield batch
            batch = []
        batch.append(box)
    yield batch


def _shape(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _observed_stride(model: Model, image: Tensor, crop: tuple[int, int]) -> int:
    """The stride of a model that does not say it, from the logits of one window."""
    grid = model(image[None, :, : crop[0], : crop[1]]).shape[-2:]
    fitting = [s for s in range(1, max(crop) + 1) if all(-(-side // s) == n for side, n in zip(crop, grid))]
    exact = [s for s in fitting if crop[0] % s == 0 and crop[1] % s == 0]
    for candidates in (fitting, exact):
        if len(candidates) == 1:
            return candidates[0]
    raise VizattnError(
        f"Windows of {crop[0]}x{crop[1]} pixels, {grid[0]}x{grid[1]} logits each, do not tell the model's stride: give "
        "model_stride, or a crop_size that is a multiple of it."
    )


def _band(
    logits: Tensor, covering: Sequence[float], out_size: tuple[int, int], top: int, bottom: int, flipped: bool
) -> Tensor:
    """Rows `top` to `bottom` of logits (C, h, w) resized to `out_size`, (C, bottom - top, out_w).

    `covering` says how many logits, down and across, cover the image; those beyond reach over its border.
    """
    height, width = logits.shape[-2:]
    # Positions as of F.interpolate(align_corners=False), for some rows only.
    y = (torch.arange(top, bottom, dtype=torch.float64, device=logits.device) + 0.5) * (covering[0] / out_size[0]) - 0.5
    y = y.clamp(0, height - 1)
    above = y.floor().long()
    below = (above + 1).clamp(max=height - 1)
    rows = torch.lerp(logits[:, above], logits[:, below], (y - above).to(logits.dtype)[:, None])
    if covering[1] == width:
        band = F.interpolate(rows[None], size=(bottom - top, out_size[1]), mode="bilinear", align_corners=False)[0]
    else:
        factor = (1.0, out_size[1] / covering[1])
        band = F.interpolate(rows[None], scale_factor=factor, mode="bilinear", align_corners=False)[0]
        band = band[..., : out_size[1]]
    return band.flip(-1) if flipped else band
