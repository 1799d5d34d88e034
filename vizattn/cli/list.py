"""List the backbones, or the adapters."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable

__all__ = ["add_arguments", "matching", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn list`."""
    parser.add_argument("pattern", nargs="?", help="only names that contain this, or match it as in '*tiny*'")
    parser.add_argument("--adapters", action="store_true", help="list the adapters instead of the backbones")
    parser.add_argument("--timm", action="store_true", help="with timm's own backbones, to which adapters attach too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table or the JSON."""
    import vizattn

    from .backbones import our_names, summary, timm_names
    from .methods import method_summary
    from .text import columns

    if args.adapters:
        rows = [method_summary(name) for name in matching("adapter", args.pattern, vizattn.list_adapters())]
    else:
        ours = our_names()
        names = [*ours, *timm_names()] if args.timm else ours
        rows = [summary(name, count=name in ours) for name in matching("backbone", args.pattern, names)]
    print(json.dumps(rows, indent=2) if args.json else columns(rows))
    return 0


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
        how = {"adapter": "vizattn list --adapters", "weights": "vizattn weights list"}.get(kind, "vizattn list --timm")
        raise unknown(kind, pattern, names, how)
    return found
