"""Prediction in one piece, by windows and with test-time augmentation, against naive versions in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn import Segmenter, VizattnError
from vizattn.heads.inference import predict_logits, predict_map


class PatchModel(nn.Module):
    """No context: the logits of a patch depend on its pixels alone, also where the image cuts it."""

    def __init__(self, stride: int, classes: int = 5, says_stride: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, classes, stride, stride)
        self.patch = stride
        self.shapes: list[tuple[int, ...]] = []
        if says_stride:
            self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        height, width = x.shape[-2:]
        return self.conv(F.pad(x, (0, -width % self.patch, 0, -height % self.patch)))


def picture(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


def naive_resize(logits: Tensor, out_size: tuple[int, int], covering: tuple[float, float]) -> Tensor:
    """Bilinear, one output position after the other: (C, h, w) -> (C, *out_size) in float64."""
    logits = logits.double()
    result = logits.new_empty(logits.shape[0], *out_size)
    axes = []
    for length, out, n in zip(logits.shape[1:], out_size, covering):
        axis = []
        for i in range(out):
            at = min(max((i + 0.5) * n / out - 0.5, 0.0), length - 1.0)
            axis.append((int(at), min(int(at) + 1, length - 1), at - int(at)))
        axes.append(axis)
    for (i, (y0, y1, wy)), (j, (x0, x1, wx)) in itertools.product(enumerate(axes[0]), enumerate(axes[1])):
        upper = logits[:, y0, x0] * (1 - wx) + logits[:, y0, x1] * wx
        lower = logits[:, y1, x0] * (1 - wx) + logits[:, y1, x1] * wx
        result[:, i, j] = upper * (1 - wy) + lower * wy
    return result


@pytest.mark.parametrize("patch", [1, 3, 4, 8])
@pytest.mark.parametrize("size", [(40, 64), (41, 67), (23, 90)])
@pytest.mark.parametrize(("crop", "step"), [((24, 24), (16, 16)), ((25, 31), (9, 13)), ((200, 16), (200, 8))])
def test_windows_equal_the_whole_exactly(patch: int, size: tuple[int, int], crop: tuple, step: tuple) -> None:
    # float64, then rounded: the convolution may sum in another order where the batch has another shape
    model, image = PatchModel(patch).double(), picture(*size).double()
    whole = predict_logits(model, image)
    windows = predict_logits(model, image, mode="slide", crop_size=crop, stride=step, batch_size=3)
    assert torch.equal(windows, whole)
    for flip in (False, True):
        kwargs = {"flip": flip, "out_size": (50, 61)}
        by_windows = predict_map(model, image, mode="slide", crop_size=crop, stride=step, **kwargs)
        assert torch.equal(by_windows, predict_map(model, image, **kwargs))


def test_overlapping_windows_do_not_round() -> None:
    """Up to 16 windows see a pixel; the mean of equal numbers is that number, bit for bit."""

    def model(x: Tensor) -> Tensor:
        return x * 0.7

    image = picture(37, 41)
    windows = predict_logits(model, image, mode="slide", crop_size=(16, 16), stride=(4, 4))
    assert torch.equal(windows, image * 0.7)


def test_overlapping_windows_are_averaged() -> None:
    """A model that answers with the mean of its window, against a sum over all windows."""

    def model(x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *x.shape[-2:])

    image = picture(10, 14)
    total, count = torch.zeros(3, 10, 14, dtype=torch.float64), torch.zeros(10, 14)
    for top, left in itertools.product((0, 3, 4), (0, 3, 6, 8)):  # the last ones end at the border
        total[:, top : top + 6, left : left + 6] += (
            image[:, top : top + 6, left : left + 6].double().mean((1, 2))[:, None, None]
        )
        count[top : top + 6, left : left + 6] += 1
    found = predict_logits(model, image, mode="slide", crop_size=(6, 6), stride=(3, 3))
    torch.testing.assert_close(found, (total / count).float(), atol=1e-6, rtol=1e-5)


def test_windows_are_batched_and_of_the_size_asked_for() -> None:
    model = PatchModel(4)
    predict_logits(model, picture(48, 64), mode="slide", crop_size=(32, 32), stride=(16, 16), batch_size=4)
    assert model.shapes == [(4, 3, 32, 32), (2, 3, 32, 32)]
    model.shapes.clear()
    predict_logits(model, picture(49, 66), mode="slide", crop_size=(34, 35), stride=(18, 18), batch_size=64)
    assert sorted({shape[2:] for shape in model.shapes}) == [(29, 30), (29, 32), (32, 30), (32, 32)]


@pytest.mark.parametrize("patch", [1, 4, 16])
def test_the_stride_of_a_model_that_does_not_say_it_is_observed(patch: int) -> None:
    model, image = PatchModel(patch, says_stride=False), picture(70, 90)
    windows = predict_logits(model, image, mode="slide", crop_size=(32, 48), stride=(16, 16))
    torch.testing.assert_close(windows, predict_logits(model, image), atol=1e-5, rtol=0)


def test_a_stride_that_does_not_show_is_asked_for() -> None:
    model, image = PatchModel(16, says_stride=False), picture(70, 90)
    kwargs = {"mode": "slide", "crop_size": (40, 44), "stride": (16, 16)}
    with pytest.raises(VizattnError, match="model_stride"):
        predict_logits(model, image, **kwargs)
    windows = predict_logits(model, image, model_stride=16, **kwargs)
    torch.testing.assert_close(windows, predict_logits(model, image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("out_size", [(64, 96), (61, 97), (16, 24), (7, 200), (1, 1)])
@pytest.mark.parametrize("band", [1, 700, 2**20])
def test_bands_equal_interpolate(out_size: tuple[int, int], band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vizattn.heads.inference.BAND", band)
    logits = torch.randn(1, 7, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits, size=out_size, mode="bilinear", align_corners=False).argmax(dim=1)[0]
    found = predict_map(lambda x: logits, picture(64, 96), out_size=out_size)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)
    declared = predict_map(lambda x: logits, picture(64, 96), out_size=out_size, model_stride=4)
    assert torch.equal(declared, found)


@pytest.mark.parametrize("size", [(61, 67), (33, 64)])
@pytest.mark.parametrize("out_size", [None, (50, 90)])
def test_logits_beyond_the_image_are_cut_not_squeezed(size: tuple[int, int], out_size: tuple[int, int] | None) -> None:
    """A grid of ceil(H / 16) rows reaches over the lower border; its logits stay over their own pixels."""
    model, image = PatchModel(16), picture(*size)
    logits = predict_logits(model, image)
    expected = naive_resize(logits, out_size or size, (size[0] / 16, size[1] / 16)).argmax(dim=0)
    assert torch.equal(predict_map(model, image, out_size=out_size).long(), expected)
    if out_size is None:
        full = F.interpolate(logits[None], scale_factor=16, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        assert torch.equal(predict_map(model, image).long(), full[: size[0], : size[1]])


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75)])
@pytest.mark.parametrize("size", [(24, 32), (27, 33)])
def test_augmentation_equals_the_naive_version(scales: tuple[float, ...], size: tuple[int, int]) -> None:
    model, image = PatchModel(4, classes=6), picture(*size)
    total = torch.zeros(6, 30, 41, dtype=torch.float64)
    for scale, flip in itertools.product(scales, (False, True)):
        sides = [round(side * scale) for side in size]
        view = F.interpolate(image[None], sides, mode="bilinear", antialias=scale < 1) if scale != 1 else image[None]
        with torch.no_grad():
            logits = model(view.flip(3) if flip else view)[0]
        part = naive_resize(logits, (30, 41), (sides[0] / 4, sides[1] / 4)).softmax(dim=0)
        total += part.flip(2) if flip else part
    found = predict_map(model, image, out_size=(30, 41), flip=True, scales=scales)
    assert torch.equal(found.long(), total.argmax(dim=0))


def test_augmentation_with_windows() -> None:
    model, image = PatchModel(4), picture(50, 67)
    kwargs = {"flip": True, "scales": (0.75, 1.5)}
    windows = predict_map(model, image, mode="slide", crop_size=(32, 32), stride=(20, 20), **kwargs)
    assert torch.equal(windows, predict_map(model, image, **kwargs))


@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_many_classes(classes: int, dtype: torch.dtype) -> None:
    def model(x: Tensor) -> Tensor:
        return F.one_hot(torch.full(x[:, 0].shape, classes - 1), classes).movedim(-1, 1).float()

    found = predict_map(model, picture(5, 6))
    assert found.dtype == dtype
    assert (found == classes - 1).all()


def test_a_backbone_of_one_size_predicts_large_and_small_images_by_windows() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=2, out_indices=(1,))
    model = Segmenter(backbone, 3, head="linear").eval()
    for size in ((97, 130), (64, 64), (40, 100), (30, 20)):
        found = predict_map(model, picture(*size), mode="slide", crop_size=(64, 64), stride=(48, 48))
        assert found.shape == size
    with pytest.raises(VizattnError, match=r"64x64 pixels, got 97x130.*slide"):
        predict_map(model, picture(97, 130))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "silde"}, "Did you mean 'slide'"),
        ({"mode": "slide"}, "crop_size and stride"),
        ({"mode": "slide", "crop_size": (16, 16), "stride": (0, 8)}, "crop_size and stride"),
        ({"mode": "slide", "crop_size": (16, 16), "stride": (16, 17)}, "gaps"),
        ({"scales": ()}, "must be positive"),
        ({"scales": (1.0, 0.0)}, "must be positive"),
        ({"scales": ("1.0", [2])}, "must be positive"),
        ({"scales": (1e308,)}, "at most 100"),
        ({"model_stride": 8}, "gave 8x8 logits, where a model of stride 8 gives 4x4"),
        ({"mode": "slide", "crop_size": (16, 16), "stride": (8, 8), "model_stride": 8}, "of stride 8 gives 2x2"),
    ],
)
def test_mistakes(kwargs: dict, message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        predict_map(PatchModel(4), picture(32, 32), **kwargs)


def test_a_batch_is_no_image() -> None:
    with pytest.raises(VizattnError, match="one image"):
        predict_map(PatchModel(4), picture(8, 8)[None])


MEMORY = """
import resource, torch
from vizattn.heads.inference import predict_map
mode, flip = {mode!r}, {flip!r}
torch.manual_seed(0)
class Model(torch.nn.Module):
    stride = 4
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 150, 4, 4)
    def forward(self, x):
        return self.conv(x)
model = Model()
image = torch.rand(3, 3000, 4000)
with torch.no_grad():
    model(image[None] if mode == "whole" else image[None, :, :512, :512])  # what the model takes by itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = predict_map(model, image, mode=mode, crop_size=(512, 512), stride=(384, 384), flip=flip)
assert found.shape == (3000, 4000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "flip", "views"), [("whole", False, 0), ("slide", False, 1), ("slide", True, 2)])
def test_memory_of_a_large_image(mode: str, flip: bool, views: int) -> None:
    """4000 x 3000 pixels, 150 classes, stride 4: logits of 429 MiB a view, which are 6,866 MiB at full resolution.

    Counted is what comes on top of the model's own forward pass, which in one piece has the logits already. Measured:
    0, 564 and 1131 MiB.
    """
    code = MEMORY.format(mode=mode, flip=flip)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mebibytes = int(run.stdout) / 1024
    print(f"{mode}, flip={flip}: {mebibytes:.0f} MiB")
    assert mebibytes < 429 * views + 300
