"""Measure a trained model or a bundle on a split of its data, or of another folder with the same classes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vizattn eval`."""
    parser.add_argument(
        "trained",
        metavar="CONFIG|WORK_DIR",
        nargs="?",
        help="the work directory or a checkpoint of a run, or the recipe of one (looked up in work_dirs/<recipe>)",
    )
    parser.add_argument("--bundle", metavar="DIR", help="measure this bundle instead")
    parser.add_argument(
        "--pretrained", action="store_true", help="measure the recipe's backbone with its published weights and head"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="with --pretrained or --bundle: the backbone's published weights, got by hand"
    )
    parser.add_argument("--data", metavar="DIR", help="a folder: a sub-folder a class, or images and masks")
    parser.add_argument(
        "--split", help="train, val or test (default: test; all images where --data has no split folders)"
    )
    parser.add_argument(
        "--cfg-options", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help="set options of the recipe"
    )
    parser.add_argument("--amp", choices=["bf16"], help="compute in bfloat16 autocast, on CPU too")
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table or JSON."""
    from vizattn.engine import Trained, as_published, evaluate, load_recipe, load_trained
    from vizattn.engine.config import parse_overrides
    from vizattn.engine.recipes import find_recipe
    from vizattn.engine.runner import is_main_process
    from vizattn.errors import VizattnError

    if (args.trained is None) == (args.bundle is None) or (args.pretrained and args.bundle):
        raise VizattnError("Name one thing to measure: a work directory, a recipe, or --bundle DIR.")
    overrides: dict[str, Any] = {"amp": args.amp} if args.amp else {}
    overrides |= parse_overrides(args.cfg_options)
    trained: Trained | None = None if args.pretrained else load_trained(_find(args), args.weights)
    recipe = load_recipe(find_recipe(args.trained)) if trained is None else trained.recipe
    split = args.split or "test"
    if args.data is not None:
        overrides, split = images_of(args.data, recipe, overrides, args.split)
    if trained is None:
        trained = as_published(recipe, args.weights, overrides, split)
    name = args.trained or args.bundle
    metrics = evaluate(trained, split=split, overrides=overrides, device=args.device)
    if not is_main_process():
        return 0
    if args.json:
        print(json.dumps({"model": name, "split": split, **metrics}, indent=2))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(name)}: {split}, {metrics['samples']} images")
    table.add_column("class")
    per_class = next(key for key in metrics if key.endswith("_per_class"))
    table.add_column("IoU" if per_class == "iou_per_class" else "accuracy", justify="right")
    for name, value in metrics[per_class].items():
        table.add_row(escape(name), "none seen" if value is None else f"{value:.2%}")
    table.add_section()
    titles = {"accuracy": "top-1", "accuracy_top5": "top-5", "miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
    for key, title in titles.items():
        if key in metrics:
            table.add_row(title, f"{metrics[key]:.2%}")
    if "loss" in metrics:
        table.add_row("cross entropy", f"{metrics['loss']:.4f}")
    Console().print(table)
    return 0


def images_of(
    folder: str, recipe: Any, overrides: dict[str, Any] | None = None, split: str | None = None
) -> tuple[dict[str, Any], str]:
    """Options that set the images of --data in the place of the recipe's, and the split to measure."""
    from vizattn.data.folder import has_split_folders

    from .train import data_overrides

    options = data_overrides(recipe, folder) | (overrides or {})
    whole = options["data.name"] == "folder" and not has_split_folders(folder)
    return options, split or ("all" if whole else "test")


def _find(args: argparse.Namespace) -> Path:
    """The folder or checkpoint that the arguments name; a recipe stands for the run of it in `work_dirs`."""
    from vizattn.engine.recipes import find_recipe, recipe_name
    from vizattn.errors import VizattnError

    path = Path(args.bundle or args.trained)
    if path.is_dir() or path.suffix == ".pth":
        return path
    if args.bundle:
        raise VizattnError(f"There is no bundle {path}: no such folder.")
    try:
        run = Path("work_dirs") / recipe_name(find_recipe(path))
    except VizattnError as error:
        raise VizattnError(f"There is no folder {path}, and no recipe: {error}") from None
    if not run.is_dir():
        raise VizattnError(f"{path} has not been trained yet: there is no {run}. See: vizattn train --help")
    return run
