"""List, fetch, verify and convert released weights. `pretrained=True` fetches by itself what it needs.

Environment: VIZATTN_HOME, the folder of the cache; VIZATTN_MIRROR, an address that has the files and is tried first;
VIZATTN_LOCK, the file that remembers which files are trusted; for the Hugging Face hub HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

ACTIONS = {
    "list": "[PATTERN]: the weights that there are, and which of them are on this machine",
    "fetch": "NAME ...: have these on this machine, converted and ready",
    "verify": "[NAME ...]: see that what was fetched is undamaged and is the trusted file",
    "convert": "FILE NAME: make a released checkpoint a safetensors file that our NAME loads, or back (--back)",
    "path": "NAME: print the file that pretrained=True loads",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn weights`."""
    actions = "; ".join(f"{name} {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", metavar="ACTION", help=actions.replace("%", "%%"))
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="as in vit_va_tiny_patch16_224, or with a tag: NAME.TAG"
    )
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help="fetch: take this file, got by hand")
    parser.add_argument("--again", action="store_true", help="fetch: also what is there already")
    parser.add_argument("--output", type=Path, metavar="FILE", help="convert: where to (default: NAME.TAG.safetensors)")
    parser.add_argument(
        "--back", action="store_true", help="convert: into the layout of the release, which its own code loads"
    )
    parser.add_argument("--force", action="store_true", help="convert: replace a file that is there")
    parser.add_argument("--json", action="store_true", help="list, verify: print JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says; 1 where `verify` finds something wrong."""
    from vizattn.errors import VizattnError, unknown

    if args.action not in ACTIONS:
        raise unknown("action", args.action, ACTIONS)
    wanted = {"convert": (2, 2), "path": (1, 1), "fetch": (1, None), "list": (0, 1), "verify": (0, None)}
    least, most = wanted[args.action]
    if len(args.names) < least or (most is not None and len(args.names) > most):
        raise VizattnError(f"Usage: vizattn weights {args.action} {ACTIONS[args.action].partition(':')[0]}")
    own = {"fetch": ("file", "again"), "convert": ("output", "force", "back"), "list": ("json",), "verify": ("json",)}
    for option in ("file", "again", "output", "force", "back", "json"):
        if getattr(args, option) and option not in own.get(args.action, ()):
            shown = {"file": "from"}.get(option, option)
            raise VizattnError(f"--{shown} does not go with: vizattn weights {args.action}")

    import vizattn  # noqa: F401  (registers the backbones)

    status: int = {"list": _list, "fetch": _fetch, "verify": _verify, "convert": _convert, "path": _path}[args.action](
        args
    )
    return status


def _list(args: argparse.Namespace) -> int:
    from vizattn.weights import release_names

    from .list import matching
    from .text import columns

    rows = [_row(name) for name in matching("weights", args.names[0] if args.names else None, release_names())]
    print(json.dumps(rows, indent=2) if args.json else columns(rows))
    return 0


def _row(name: str) -> dict[str, Any]:
    from vizattn.weights import cached_file, find, metadata_of, release_of, trusted

    cfg = find(name)
    release = release_of(cfg)
    known = trusted(name)
    here = "packaged" if release is None else "fetched" if metadata_of(cached_file(name)) else "no"
    return {
        "weights": name,
        "here": here,
        "licence": cfg.license or None,
        "megabytes": round(known.size / 1e6, 1) if known.size else None,
        "sha256": known.sha256[:12] if known.sha256 else None,
        "from": release.origin if release else None,
    }


def _fetch(args: argparse.Namespace) -> int:
    from vizattn.errors import VizattnError
    from vizattn.weights import fetch, find, release_of

    if args.file and len(args.names) > 1:
        raise VizattnError("--from gives one file, so name one set of weights.")
    cfgs = [find(name) for name in args.names]
    for cfg in cfgs:
        release = release_of(cfg)
        print(fetch(release, given=args.file, again=args.again) if release else cfg.file)
    return 0


def _path(args: argparse.Namespace) -> int:
    from vizattn.errors import VizattnError
    from vizattn.weights import cached_file, find, metadata_of, release_of

    cfg = find(args.names[0])
    release = release_of(cfg)
    if release and metadata_of(cached_file(release.key)) is None:
        raise VizattnError(f"{release.key} is not here yet. Get it with: vizattn weights fetch {release.key}")
    print(cached_file(release.key) if release else cfg.file)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from vizattn.weights import find, release_names, release_of, verify

    from .text import columns

    releases = [release_of(find(name)) for name in args.names or release_names()]
    rows = [{"weights": release.key, "state": verify(release)} for release in releases if release]
    if not args.names:
        rows = [row for row in rows if row["state"] != "not fetched"]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(columns(rows) if rows else "Nothing has been fetched.")
    return int(any(row["state"] != "ok" for row in rows))


def _convert(args: argparse.Namespace) -> int:
    from vizattn.errors import VizattnError
    from vizattn.files import explain_disk_errors
    from vizattn.weights import converted, find, read_weights, release_of, released, save_converted, save_released

    file, cfg = Path(args.names[0]), find(args.names[1])
    name = f"{cfg.architecture}.{cfg.tag}"
    release = release_of(cfg) if args.back else None
    output = args.output or Path(release.file_name if release else f"{name}.safetensors")
    if not file.is_file():
        raise VizattnError(f"There is no file {file}.")
    if output.exists() and not args.force:
        raise VizattnError(f"{output} is there already: choose another --output, or replace it with --force.")
    if args.back:
        checkpoint = released(read_weights(file), cfg)
        with explain_disk_errors(output.parent, "choose another --output"):
            save_released(checkpoint, output)
        print(f"{output}: as published at {release.origin if release else name}.")
        return 0
    state = converted(read_weights(file), cfg)
    with explain_disk_errors(output.parent, "choose another --output"):
        save_converted(state, output, name=name, source=file.name)
    print(f"{output}: {len(state)} tensors. Load it with pretrained_cfg_overlay={{'file': {str(output)!r}}}.")
    return 0
