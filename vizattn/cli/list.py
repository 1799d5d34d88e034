"""List the backbones, the adapters, or the recipes."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable
from typing import Any

__all__ = ["add_arguments", "matching", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn list`."""
    parser.add_argument("pattern", nargs="?", help="only names that contain this, or match it as in '*tiny*'")
    parser.add_argument("--adapters", action="store_true", help="list the adapters instead of the backbones")
    parser.add_argument("--recipes", action="store_true", help="list the recipes that `vizattn train` knows by name")
    parser.add_argument("--timm", action="store_true", help="with timm's own backbones, to which adapters attach too")
    parser.add_argument("--family", help="only this family, such as nat or vit; with --timm also a module of timm's")
    parser.add_argument(
        "--weights",
        choices=("released", "packaged", "none"),
        help="only those whose weights are to download, ship with vizattn, or do not exist",
    )
    parser.add_argument("--max-params", type=_number, metavar="N", help="at most so many parameters, as in 10M or 800K")
    parser.add_argument("--max-gmacs", type=_number, metavar="G", help="at most so many thousand million multiply-adds")
    parser.add_argument("--sort", choices=("params", "gmacs", "name"), help="smallest first (default: name)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table or the JSON."""
    import vizattn

    from .text import columns

    rows: list[dict[str, Any]]
    if args.adapters:
        from .methods import method_summary

        _refuse_with(args, "adapters", "timm", "family", "weights", "max_params", "max_gmacs", "sort")
        rows = [method_summary(name) for name in matching("adapter", args.pattern, vizattn.list_adapters())]
    elif args.recipes:
        from vizattn.engine.recipes import list_recipes, recipe_title

        _refuse_with(args, "recipes", "timm", "family", "weights", "max_params", "max_gmacs", "sort")
        names = matching("recipe", args.pattern, list_recipes())
        rows = [{"recipe": name, "what": recipe_title(name)} for name in names]
    else:
        if args.timm:
            _refuse_with(args, "timm", "max_params", "max_gmacs")  # nobody counted those
        rows = _backbones(args)
    print(json.dumps(rows, indent=2) if args.json else columns(rows))
    return 0


def _backbones(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that the arguments ask for, at least one."""
    from vizattn.errors import VizattnError, unknown

    from .backbones import family, our_names, summary, timm_names

    names = [*our_names(), *timm_names()] if args.timm else our_names()
    families = {name: family(name) for name in names}
    if args.family and args.family not in families.values():
        raise unknown("family", args.family, set(families.values()))
    most = {"parameters": args.max_params, "gmacs": args.max_gmacs}
    rows = [
        row
        for row in map(summary, matching("backbone", args.pattern, names))
        if args.family in (None, families[row["name"]])
        and args.weights in (None, row["weights"])
        and all(limit is None or (row[key] is not None and row[key] <= limit) for key, limit in most.items())
    ]
    if not rows:
        raise VizattnError("No backbone is all of this: leave out an option, or raise its limit.")
    if args.sort in ("params", "gmacs"):
        key = "parameters" if args.sort == "params" else "gmacs"
        rows.sort(key=lambda row: (row[key] is None, row[key] or 0))
    return rows


def _refuse_with(args: argparse.Namespace, option: str, *others: str) -> None:
    from vizattn.errors import VizattnError

    if given := [other for other in others if getattr(args, other)]:
        raise VizattnError(f"--{given[0].replace('_', '-')} does not go with --{option}.")


def _number(text: str) -> float:
    """``"10M"`` -> 1e7."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper())
    try:
        number = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 10M, 800K or 2.5")
    return number


def matching(kind: str, pattern: str | None, names: Iterable[str]) -> list[str]:
    """Those of `names` that match; an error with the closest names if none does."""
    from vizattn.errors import unknown

    names = list(names)
    if not pattern:
        return names
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = fnmatch.filter(names, glob.lower())
    if not found:
        names += {part for name in names for part in name.split("_") if len(part) > 2}  # "tniy" is close to "tiny"
        how = {"adapter": "list --adapters", "recipe": "list --recipes", "weights": "weights list"}
        raise unknown(kind, pattern, names, f"vizattn {how.get(kind, 'list --timm')}")
    return found
