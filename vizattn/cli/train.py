"""Train a backbone or an adapter from a recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vizattn train`."""
    parser.add_argument("config", metavar="CONFIG", help="a recipe: a file, or the name of a packaged one")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="train on this folder: a sub-folder a class, or images and masks (segmentation)",
    )
    parser.add_argument(
        "--cfg-options",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="set options of the recipe, as in optimizer.lr=0.001 adapter.num_tokens=16",
    )
    parser.add_argument("--weights", metavar="FILE", help="begin with these pretrained weights, got by hand")
    parser.add_argument("--work-dir", metavar="DIR", help="where everything goes (default: work_dirs/<recipe>)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work directory")
    parser.add_argument("--amp", choices=["bf16"], help="compute in bfloat16 autocast, on CPU too")
    parser.add_argument("--seed", type=int, help="of everything random")
    parser.add_argument("--epochs", type=int, help="length of the training")
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's options that the command line sets."""
    from vizattn.engine import load_recipe
    from vizattn.engine.config import parse_overrides
    from vizattn.engine.models import weights_options

    named = {"amp": args.amp, "seed": args.seed, "schedule.epochs": args.epochs}
    overrides = {name: value for name, value in named.items() if value is not None}
    if args.data is not None:
        overrides |= data_overrides(load_recipe(args.config), args.data)
    if args.weights is not None:
        overrides |= weights_options(args.weights)
    return overrides | parse_overrides(args.cfg_options)


def data_overrides(recipe: Any, folder: str) -> dict[str, Any]:
    """Options that set `folder` in the place of a recipe's data.

    What a recipe says of layout and labels holds for its own data set: in a folder of another layout it does not.
    """
    if not isinstance(recipe, dict) or recipe.get("task") != "segmentation":
        return {"data.name": "folder", "data.root": folder}
    options: dict[str, Any] = {"data.name": "segmentation_folder", "data.root": folder}
    layout = recipe.get("data", {}).get("layout", "auto")
    if layout != "auto":
        from vizattn.data.segmentation_layouts import find_pairs

        if find_pairs(folder).layout != layout:
            options |= {"data.layout": "auto", "data.reduce_zero_label": False}
    return options


def run(args: argparse.Namespace) -> int:
    """Train, and print the result."""
    from vizattn.engine import train
    from vizattn.engine.kinds import kind_of
    from vizattn.engine.recipes import recipe_name

    work_dir = Path(args.work_dir or Path("work_dirs") / recipe_name(args.config))
    try:
        result = train(
            args.config,
            work_dir=work_dir,
            overrides=overrides_of(args),
            resume=args.resume,
            device=args.device,
            quiet=args.quiet,
        )
    except KeyboardInterrupt:
        rest = [item for item in sys.argv[1:] if item != "--resume"]
        print(f"\nInterrupted. Go on with: {shlex.join(['vizattn', *rest, '--resume'])}", file=sys.stderr)
        return 130
    if result.main_process:
        kind = kind_of(result.config)
        for split, metrics in result.metrics.items():
            print(f"{split} {kind.title} {metrics[kind.best]:.2%} on {metrics['samples']} images")
        print(f"trained {result.params['with_head']:,} of {result.params['total']:,} parameters", end=" ")
        print(f"in {result.seconds:.1f} s; see {result.work_dir}/results.json and {result.exported}/")
    return 0
