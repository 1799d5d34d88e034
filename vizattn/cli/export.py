"""Write a trained model as a file that other programs run: ONNX, or torch.export; compared with the model on the spot.

The file has the backbone, the adapters and the head, and in its metadata how images are prepared and what the classes
are called. It takes float32 `images` (batch, 3, height, width) and gives `logits`; of segmenters, for each pixel.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vizattn.engine.export import Exported

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn export`."""
    parser.add_argument(
        "trained",
        metavar="DIR",
        type=Path,
        help="a bundle, a model folder, or the work directory or a checkpoint of a run",
    )
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="default: onnx")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the run's name, in this folder")
    parser.add_argument("--merge", action="store_true", help="fold the adapters into the weights, where that is exact")
    parser.add_argument(
        "--int8", action="store_true", help="onnx: matrix weights in 8 bits, and what this costs in accuracy"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="images to measure --int8 on (default: what the model was trained on)"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of images, in pixels (default: as in training)"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="the pretrained weights of the bundle's backbone, got by hand"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say what was measured."""
    from vizattn.engine.evaluate import load_trained
    from vizattn.engine.export import FORMATS, export_model
    from vizattn.errors import VizattnError
    from vizattn.files import explain_disk_errors

    from .eval import images_of

    if args.data is not None and not args.int8:
        raise VizattnError("--data is for --int8, whose accuracy is measured.")
    if args.size is not None and min(args.size) < 1:
        raise VizattnError(f"--size takes two positive numbers, not {args.size[0]} and {args.size[1]}.")
    trained = load_trained(args.trained, args.weights)
    overrides, split = images_of(args.data, trained.recipe) if args.data is not None else ({}, "test")
    path = args.out or Path(_name(args.trained) + FORMATS[args.format])
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_disk_errors(path.parent, "choose another file with --out"):
        exported = export_model(
            trained,
            path,
            format=args.format,
            merge=args.merge,
            int8=args.int8,
            size=tuple(args.size) if args.size else None,
            data=overrides,
            split=split,
        )
    print(_report(exported, args.format, len(trained.class_names)))
    return 0


def _name(trained: Path) -> str:
    folder = trained.resolve()
    folder = folder.parent if folder.name in ("bundle", "model") else folder
    return folder.stem if folder.suffix == ".pth" else folder.name


def _report(exported: Exported, format: str, classes: int) -> str:
    what = " and ".join([*exported.adapters, ""]).removesuffix(" and ")
    height, width = exported.size
    sizes = "batch, height and width are free"
    if not exported.any_size:
        sizes = f"the batch is free, height and width are {height} and {width}: {exported.why_fixed}"
    by = "onnxruntime's" if format == "onnx" else "the loaded file's"
    lines = [
        f"written  {exported.file} ({exported.bytes / 1e6:.1f} MB)",
        f"model    {what + ' on ' if what else ''}{exported.backbone}, {classes} classes",
        f"images   {sizes}",
        f"check    {by} logits differ from the model's by {exported.difference:.1e} at most; "
        f"the largest is {exported.largest:.3g}",
    ]
    if (int8 := exported.int8) is not None:
        name = {"miou": "mIoU"}.get(int8["metric"], int8["metric"])
        change = 100 * (int8["int8"] - int8["float32"])
        lines.append(
            f"int8     {name} {int8['float32']:.2%} -> {int8['int8']:.2%} ({change:+.2f} points) on "
            f"{int8['samples']:,} images of {int8['split']}; "
            f"{int8['megabytes_float32']:.1f} -> {int8['megabytes_int8']:.1f} MB (the check is of float32)"
        )
    return "\n".join(lines)
