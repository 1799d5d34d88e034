"""Dynamic quantisation of an exported model, and what it costs in accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vizattn.engine.build import build_data
from vizattn.engine.config import apply_overrides, resolve_config
from vizattn.engine.evaluate import Trained, evaluate
from vizattn.engine.kinds import kind_of
from vizattn.engine.onnx_model import OnnxModel
from vizattn.errors import VizattnError

__all__ = ["check_data", "measure_int8", "to_int8"]


def to_int8(written: bytes) -> bytes:
    """The ONNX file with constant weights of matrix products in int8, their other factor quantised as it comes.

    A scale an output channel. Weights use 7 of the 8 bits: CPUs without VNNI add pairs of products in 16 bits, which
    would overflow. Convolutions stay: onnxruntime has none in int8 that is faster.
    """
    import logging

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it asks for a preparation that gains nothing here
    try:
        with tempfile.TemporaryDirectory() as scratch:
            quantize_dynamic(
                onnx.load_from_string(written),
                Path(scratch, "int8.onnx"),
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
            return Path(scratch, "int8.onnx").read_bytes()
    finally:
        logging.disable(before)


def _recipe(trained: Trained, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of what is measured, which says the images."""
    recipe = apply_overrides(trained.recipe, overrides)
    if "data" not in recipe:
        raise VizattnError("The model does not say what images it was trained on.")
    return recipe


def check_data(trained: Trained, overrides: Mapping[str, Any], split: str) -> None:
    """See that there are images to measure on, before anything takes long.

    Raises:
        VizattnError: There are none.
    """
    try:
        build_data(resolve_config(_recipe(trained, overrides))["data"], [split])
    except (OSError, VizattnError) as error:
        raise VizattnError(f"int8 is measured on images: name some with --data DIR. {error}") from error


def measure_int8(
    trained: Trained, whole: bytes, int8: bytes, size: tuple[int, int] | None, overrides: Mapping[str, Any], split: str
) -> dict[str, Any]:
    """Both files on the same images, by onnxruntime.

    Args:
        trained: The model that they came from.
        whole: The file in float32.
        int8: The file in int8.
        size: Height and width of images, where they are fixed.
        overrides: Dotted options on top of the recipe, which say the images.
        split: Which of them.

    Returns:
        metric ("accuracy" or "miou"), float32 and int8 (its values in 0..1), samples, split, megabytes_float32 and
        megabytes_int8.
    """
    recipe = resolve_config(_recipe(trained, overrides))
    segments = recipe["task"] == "segmentation"
    if segments and size is not None:
        recipe["inference"] |= {"mode": "slide", "crop_size": list(size), "stride": None, "scales": [1.0]}
    metric = kind_of(recipe).best
    found = []
    for written in (whole, int8):
        model = OnnxModel(written, size if segments else None)
        found.append(evaluate(replace(trained, model=model, config=recipe), split=split, device="cpu"))
    return {
        "metric": metric,
        "float32": found[0][metric],
        "int8": found[1][metric],
        "samples": found[0]["samples"],
        "split": split,
        "megabytes_float32": round(len(whole) / 1e6, 3),
        "megabytes_int8": round(len(int8) / 1e6, 3),
    }
