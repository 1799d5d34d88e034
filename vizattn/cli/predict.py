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
from typing import Any

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
    parser.add_argument(
        "--save-overlay",
        type=Path,
        metavar="DIR",
        help="write each picture with its classes below it; of a segmenter, the overlays there and not by the masks",
    )
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Predict and print; 1 if some image could not be read, which the results and stderr name."""
    from vizattn.engine.build import choose_device
    from vizattn.engine.evaluate import load_trained
    from vizattn.engine.predict import FIRST_OF_SEVERAL, Predictor
    from vizattn.errors import VizattnError
    from vizattn.files import write_text

    from .predict_pictures import predict_masks, refuse_overwriting, unique_names
    from .text import printable

    if args.output and not Path(args.output).parent.is_dir():
        raise VizattnError(f"There is no folder {Path(args.output).parent} for --output.")
    paths = expand(args.images)
    trained = load_trained(args.bundle, args.weights)
    trained.model.to(choose_device(args.device))
    predictor = Predictor(trained)
    if args.masks and not predictor.segments:
        raise VizattnError(f"--masks is for models that segment images; {args.bundle} classifies them.")
    masks = (args.masks or Path("predictions")) if predictor.segments else None
    overlays = args.save_overlay or masks
    names = unique_names(paths) if overlays else [""] * len(paths)
    refuse_overwriting(paths, names, masks, overlays)
    results: list[dict[str, Any]] = []
    images = list(zip(paths, names, strict=True))
    if masks and overlays:
        results += predict_masks(
            predictor, (batch[0] for batch in _with_progress(images, 1)), masks, overlays, args.top_k
        )
    else:
        for batch in _with_progress(images, args.batch_size):
            results += predict_batch(predictor, batch, overlays, args.top_k)

    text = {"table": _table, "json": _json, "csv": _csv}[args.format](results)
    if args.output:
        write_text(args.output, text)
    else:
        sys.stdout.write(text)
    several = [result["image"] for result in results if result.get("note") == FIRST_OF_SEVERAL]
    if several:
        note = f"Of {len(several)} of the files {FIRST_OF_SEVERAL} was taken, as of {several[0]}."
        print(printable(note), file=sys.stderr)
    failed = [result for result in results if "error" in result]
    for result in failed:
        print(printable(f"Cannot read {result['image']}: {result['error']}"), file=sys.stderr)
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
    predictor: Any, images: Sequence[tuple[Path, str]], overlays: Path | None, top_k: int
) -> list[dict[str, Any]]:
    """A dict an image: `image` and either `predictions` (class, probability; best first) or `error`.

    With a folder for `overlays`, each picture with its classes below it becomes ``NAME_overlay.png`` there, `overlay`.
    """
    from vizattn.engine.pictures import caption, save_image
    from vizattn.engine.predict import FIRST_OF_SEVERAL, read_image
    from vizattn.errors import VizattnError

    results: list[dict[str, Any]] = [{"image": str(path)} for path, _ in images]
    tensors: list[Any] = []
    read: list[tuple[dict[str, Any], Path | None, Any]] = []
    for (path, name), result in zip(images, results, strict=True):
        try:
            image = read_image(path)
            tensors.append(predictor.transform(image))
        except (VizattnError, MemoryError) as error:
            result["error"] = str(error) or "there is not enough memory for it"
            continue
        if image.info.get("first_of_several"):
            result["note"] = FIRST_OF_SEVERAL
        image.thumbnail((1024, 1024))  # what a picture of it shows
        read.append((result, overlays / f"{name}_overlay.png" if overlays else None, image if overlays else None))
    if not read:
        return results
    try:
        classes = predictor.classify(tensors, top_k)
    except MemoryError as error:
        raise VizattnError(
            f"There is not enough memory for {len(tensors)} images at a time: lower --batch-size."
        ) from error
    for (result, file, image), best in zip(read, classes, strict=True):
        result["predictions"] = best
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_image(caption(image, [f"{100 * p['probability']:.1f} %  {p['class']}" for p in best]), file)
            result["overlay"] = str(file)
    return results


def _with_progress(paths: Sequence[Any], batch_size: int) -> Iterator[Sequence[Any]]:
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
