"""Trained models as files that other programs run: ONNX, or torch.export; checked before they are written."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import DEFAULT_CROP_PCT
from torch import Tensor, nn

import vizattn
from vizattn.adapters import attached
from vizattn.adapters.anatomy import core
from vizattn.data.transforms import check_preprocessing
from vizattn.engine.evaluate import Trained
from vizattn.engine.onnx_model import OnnxModel, need_onnx
from vizattn.engine.segmentation import pair
from vizattn.errors import VizattnError, unknown
from vizattn.files import replacing
from vizattn.heads import Segmenter
from vizattn.heads.resize import upsample

__all__ = ["FORMATS", "Exported", "PixelLogits", "export_model", "metadata_of"]

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""Formats and the endings of their files."""
TOLERANCE = 1e-3
"""Largest difference of logits that is rounding, relative to the largest logit."""
_MOST_BYTES = 2**31 - 2**20  # protobuf's limit, with room for the graph

Size = tuple[int, int]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what was measured of it."""

    file: Path
    bytes: int
    backbone: str
    adapters: list[str]
    """Methods that are in the file as modules of their own; none after merging."""
    size: Size
    """Height and width of images in pixels: what the file was made with."""
    any_size: bool
    """Whether it takes images of other sizes, too."""
    why_fixed: str | None
    """Why not, if so."""
    difference: float
    """Largest difference of a logit from the model's."""
    largest: float
    """Largest logit, in magnitude."""
    int8: dict[str, Any] | None = None
    """See `vizattn.engine.export_int8.measure_int8`."""


class PixelLogits(nn.Module):
    """A segmenter with logits for each pixel, (B, 3, H, W) -> (B, classes, H, W): where it is largest is the class."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        """Logits as fine as the images."""
        return upsample(self.segmenter(images), self.segmenter.stride, images.shape[-2:])


def export_model(
    trained: Trained,
    path: Path,
    *,
    format: str = "onnx",
    merge: bool = False,
    int8: bool = False,
    size: Size | None = None,
    data: Mapping[str, Any] | None = None,
    split: str = "test",
) -> Exported:
    """Write backbone, adapters and head as one file; the batch size is open, height and width too where they can be.

    The file takes float32 ``images`` (B, 3, H, W), prepared as its metadata say, and gives ``logits`` (B, classes), of
    segmenters (B, classes, H, W). It is compared with the model before it appears at `path`: by onnxruntime, or loaded
    again by torch.

    Args:
        trained: From `load_trained`; merging changes its model.
        path: The file.
        format: A key of `FORMATS`.
        merge: Fold the adapters into the weights.
        int8: Weights of matrix products in 8 bits (onnx only), with the loss of accuracy measured.
        size: Height and width of images; by default those of training.
        data: For int8, dotted options of the recipe that say which images, as in ``{"data.root": "photos"}``.
        split: For int8, which of them.

    Raises:
        VizattnError: onnx or onnxruntime are not installed, adapters that cannot be merged, a model that cannot be
            exported or whose file gives other logits, no images to measure int8 on.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "onnx":
        need_onnx()
        held = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
        if held > _MOST_BYTES:
            raise VizattnError(f"The model has {held / 1e9:.1f} GB, an ONNX file at most 2: take --format torch.")
    if int8 and format != "onnx":
        raise VizattnError("int8 is for --format onnx: onnxruntime makes it, and runs it.")
    if int8:
        from vizattn.engine.export_int8 import check_data

        check_data(trained, data or {}, split)
    if merge:
        vizattn.merge(trained.model)
    model = trained.model.float().cpu().eval()
    size = size or _usual_size(trained)
    network: nn.Module = PixelLogits(model).eval() if isinstance(model, Segmenter) else model
    notes = metadata_of(trained)
    written, why_fixed, difference, largest = _checked(network, format, size, notes)
    measured = None
    if int8:
        from vizattn.engine.export_int8 import measure_int8, to_int8

        whole, written = written, to_int8(written)
        measured = measure_int8(trained, whole, written, size if why_fixed else None, data or {}, split)
        written = _with_metadata(written, notes | {"int8": json.dumps(measured)})
    with replacing(path) as temporary:
        temporary.write_bytes(written)
    return Exported(
        file=path,
        bytes=len(written),
        backbone=notes["backbone"],
        adapters=json.loads(notes["adapters"]),
        size=size,
        any_size=why_fixed is None,
        why_fixed=why_fixed,
        difference=difference,
        largest=largest,
        int8=measured,
    )


def metadata_of(trained: Trained) -> dict[str, str]:
    """What travels in the file: plain strings for names and versions, JSON for the rest."""
    cfg: Any = getattr(core(trained.model), "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(core(trained.model)).__name__
    segmenter = isinstance(trained.model, Segmenter)
    preprocessing = check_preprocessing(trained.preprocessing)
    preprocessing["crop_pct"] = preprocessing["crop_pct"] or DEFAULT_CROP_PCT  # who reads this has no defaults
    if segmenter:
        data = trained.recipe.get("data") or {}
        preprocessing = {key: preprocessing[key] for key in ("mean", "std", "interpolation")}
        preprocessing["short_side"] = data.get("short_side")
    return {
        "task": "segmentation" if segmenter else "classification",
        "backbone": f"{name}.{cfg['tag']}" if cfg.get("tag") else name,
        "adapters": json.dumps([a.method for a in attached(trained.model)]),
        "class_names": json.dumps(trained.class_names),
        "preprocessing": json.dumps(preprocessing),
        "palette": json.dumps(trained.palette),
        "vizattn_version": vizattn.__version__,
    }


def _usual_size(trained: Trained) -> Size:
    """Height and width that the model was trained with; its backbone's own where its data has no one size."""
    data = trained.recipe.get("data") or {}
    if isinstance(trained.model, Segmenter) and (crop := pair("data.crop_size", data.get("crop_size"))):
        return crop
    _, height, width = trained.preprocessing["input_size"]
    return height, width


def _checked(
    network: nn.Module, format: str, size: Size, notes: dict[str, str]
) -> tuple[bytes, str | None, float, float]:
    """The file; why height and width are fixed, if so; its largest difference, and the largest logit."""
    make = _onnx if format == "onnx" else _torch
    others, why_fixed = _other_sizes(network, size)
    for sizes in [[size, *others], [size]] if others else [[size]]:
        try:
            with _quiet():
                written, run = make(_capture(network, size, open_size=len(sizes) > 1), notes)
                return written, why_fixed, *_compare(network, run, sizes)
        except Exception as error:  # torch, onnxscript and onnxruntime each raise all kinds
            failure = error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            why_fixed = f"it cannot be exported as {format} with these open ({reason})"
    if isinstance(failure, VizattnError):
        raise failure
    raise VizattnError(f"This model cannot be exported as {format}: {reason}") from failure


def _other_sizes(network: nn.Module, size: Size) -> tuple[list[Size], str | None]:
    """Other sizes that the model takes, one of them odd; if none, why."""
    if isinstance(network, PixelLogits) or not hasattr(network, "blocks"):  # trying it may take many minutes
        return [], "of pyramids and segmenters the exporters cannot follow how maps of odd sizes are padded and cut"
    step = max(2, size[0] // 4)
    taken, refused = [], None
    for other in ((size[0] + 2 * step, size[1] + step), (size[0] + 1, size[1] + 13)):
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, *other))
            taken.append(other)
        except Exception:  # each model has its own
            refused = refused or f"the model takes no images of {other[0]} x {other[1]}, for one"
    return taken, None if taken else refused


def _capture(network: nn.Module, size: Size, open_size: bool) -> Any:
    batch = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if open_size else {}
    with torch.no_grad():
        return torch.export.export(network, (torch.zeros(2, 3, *size),), dynamic_shapes=({**batch, **sides},))


Run = Callable[[Tensor], Tensor]


def _onnx(program: Any, notes: Mapping[str, str]) -> tuple[bytes, Run]:
    with torch.no_grad():  # as it was captured: operators of attention are taken apart differently with gradients
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
        )
    assert exported is not None
    written = _with_metadata(exported.model_proto.SerializeToString(), notes)
    return written, OnnxModel(written)


def _with_metadata(written: bytes, notes: Mapping[str, str]) -> bytes:
    import onnx

    proto = onnx.load_from_string(written)
    onnx.helper.set_model_props(proto, dict(notes))
    return proto.SerializeToString()


def _torch(program: Any, notes: Mapping[str, str]) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(notes)})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _compare(network: nn.Module, run: Run, sizes: Sequence[Size]) -> tuple[float, float]:
    """Largest difference of `run` from the model over batches and sizes, and the largest logit.

    Raises:
        VizattnError: They differ by more than rounding.
    """
    difference = largest = 0.0
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for batch in (1, 3):
            images = torch.randn(batch, 3, *size, generator=generator)
            with torch.no_grad():
                expected, found = network(images), run(images)
            if found.shape != expected.shape:
                raise VizattnError(f"The exported file gives {tuple(found.shape)}, the model {tuple(expected.shape)}.")
            difference = max(difference, (found - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    if not difference <= TOLERANCE * largest:
        raise VizattnError(
            f"The exported file is not the model: its logits differ by {difference:.2g}, and are {largest:.2g} at most."
        )
    return difference, largest


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of the exporters, which speak of their own parts at length."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
