"""Classify images, or segment them: the likeliest classes of each, by name; of segmenters also masks and overlays."""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn predict`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders (with all below), or globs")
    parser.add_argument(
        "--bundle", required=True, type=Path, help="a bundle, or the work directory or a checkpoint of a run"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="the pretrained weights of the bundle's backbone, got by hand"
    )
    parser.add_argument("--top-k", type=_positive, default=5, metavar="K", help="classes an image (default: 5)")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the screen")
    parser.add_argument(
        "--masks", type=Path, metavar="DIR", help="of a segmenter: where masks and overlays go (default: predictions)"
    )
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Predict and print; 1 if some image could not be read, which the results and stderr name."""
    from vizattn.data import build_transforms
    from vizattn.engine.build import choose_device
    from vizattn.engine.evaluate import load_trained
    from vizattn.errors import VizattnError
    from vizattn.files import write_text
    from vizattn.heads import Segmenter

    from .predict_masks import predict_masks, refuse_overwriting, unique_names

    paths = expand(args.images)
    trained = load_trained(args.bundle, args.weights)
    model = trained.model.to(choose_device(args.device))
    results: list[dict[str, Any]] = []
    if isinstance(model, Segmenter):
        each = (batch[0] for batch in _with_progress(paths, 1))
        names, folder = unique_names(paths), args.masks or Path("predictions")
        refuse_overwriting(paths, names, folder)
        results += predict_masks(trained, zip(each, names), folder, args.top_k)
    elif args.masks:
        raise VizattnError(f"--masks is for models that segment images; {args.bundle} classifies them.")
    else:
        transform = build_transforms(trained.preprocessing, train=False)
        for batch in _with_progress(paths, args.batch_size):
            results += predict_batch(model, batch, transform, trained.class_names, args.top_k)

    text = {"table": _table, "json": _json, "csv": _csv}[args.format](results)
    if args.output:
        write_text(args.output, text)
    else:
        sys.stdout.write(text)
    failed = [result for result in results if "error" in result]
    for result in failed:
        print(f"Cannot read {result['image']}: {result['error']}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(results)} images could not be read.", file=sys.stderr)
    return 1 if failed else 0


def expand(inputs: Sequence[str]) -> list[Path]:
    """The image files meant by `inputs`, in order, each once.

    Raises:
        VizattnError: An input that does not exist, or a folder without images.
    """
    from vizattn.data.images import IMAGE_SUFFIXES, find_images
    from vizattn.errors import VizattnError

    found: dict[Path, None] = {}
    for name in inputs:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise VizattnError(f"There is no image, folder or match for {name!r} (from {Path.cwd()}).")
        for path in map(Path, matches):
            files = [path / file for file in find_images(str(path))] if path.is_dir() else [path]
            if not files and len(matches) == 1:
                endings = ", ".join(sorted(IMAGE_SUFFIXES))
                raise VizattnError(f"There are no images below {path}. Images end in {endings}.")
            found.update(dict.fromkeys(files))
    return list(found)


def predict_batch(
    model: nn.Module, paths: Sequence[Path], transform: Any, class_names: Sequence[str], top_k: int
) -> list[dict[str, Any]]:
    """A dict an image: `image` and either `predictions` (class, probability; best first) or `error`."""
    import torch
    from PIL import UnidentifiedImageError

    from vizattn.data.images import load_rgb

    results: list[dict[str, Any]] = [{"image": str(path)} for path in paths]
    tensors: dict[int, Tensor] = {}
    for i, path in enumerate(paths):
        try:
            tensors[i] = transform(load_rgb(path))
        except OSError as error:
            results[i]["error"] = (
                "not an image file" if isinstance(error, UnidentifiedImageError) else error.strerror or str(error)
            )
    if tensors:
        device = next(model.parameters()).device
        with torch.inference_mode():
            probabilities = model(torch.stack(list(tensors.values())).to(device)).float().softmax(-1).cpu()
        for i, row in zip(tensors, probabilities, strict=True):
            best = row.topk(min(top_k, len(row)))
            results[i]["predictions"] = [
                {"class": class_names[c], "probability": round(p, 6)}
                for p, c in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
    return results


def _with_progress(paths: Sequence[Path], batch_size: int) -> Iterator[Sequence[Path]]:
    """Batches of `paths`, with a bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    bar = Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=console, disable=not console.is_terminal
    )
    with bar:
        task = bar.add_task("Predicting", total=len(paths))
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            yield batch
            bar.advance(task, len(batch))


def _table(results: Sequence[dict[str, Any]]) -> str:
    from .text import columns

    rows = []
    for result in results:
        best = [
            f"{p['class']} {100 * p.get('probability', p.get('share')):.1f} %" for p in result.get("predictions", [])
        ]
        rows.append(
            {"image": result["image"], "prediction": best[0] if best else "unreadable", "then": ", ".join(best[1:])}
        )
    return columns(rows) + "\n"


def _json(results: Sequence[dict[str, Any]]) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False) + "\n"


def _csv(results: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    number = "share" if any("mask" in result for result in results) else "probability"
    writer.writerow(["image", "rank", "class", number, "error"])
    for result in results:
        if "error" in result:
            writer.writerow([result["image"], "", "", "", result["error"]])
        for rank, best in enumerate(result.get("predictions", []), 1):
            writer.writerow([result["image"], rank, best["class"], best[number], ""])
    return file.getvalue()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
