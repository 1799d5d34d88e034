"""Show, compare, merge and average bundles.

`show` and `diff` end with status 1 where a check fails or the bundles differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

ACTIONS = {
    "show": "DIR: what a bundle is, and whether it is whole",
    "diff": "DIR DIR: what differs in their options and in what they learnt",
    "merge": "DIR --out DIR: fold it into its backbone: one plain model, which timm loads by itself",
    "average": "DIR DIR ... --out DIR: the weighted average of bundles of one backbone, method and head",
}
_OWN = {
    "show": ("load", "weights", "json"),
    "diff": ("json",),
    "merge": ("out", "weights"),
    "average": ("out", "shares"),
}
_SHOWN = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn bundle`."""
    parser.add_argument("action", metavar="ACTION", help="; ".join(f"{name} {text}" for name, text in ACTIONS.items()))
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="bundles, or work directories of runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="merge, average: where to")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="W", help="average: of each bundle (default: all the same)"
    )
    parser.add_argument("--load", action="store_true", help="show: also load it onto its backbone, got if need be")
    parser.add_argument(
        "--weights", metavar="FILE", help="show --load, merge: the pretrained weights of the backbone, got by hand"
    )
    parser.add_argument("--json", action="store_true", help="show, diff: print JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    from vizattn.errors import VizattnError, unknown

    if args.action not in ACTIONS:
        raise unknown("action", args.action, ACTIONS)
    least, most = {"show": (1, 1), "diff": (2, 2), "merge": (1, 1), "average": (2, None)}[args.action]
    writes = "out" in _OWN[args.action]
    if not least <= len(args.folders) <= (most or len(args.folders)) or (writes and args.out is None):
        raise VizattnError(f"Usage: vizattn bundle {args.action} {ACTIONS[args.action].partition(':')[0]}")
    for option in ("out", "shares", "load", "weights", "json"):
        if getattr(args, option) and option not in _OWN[args.action]:
            raise VizattnError(f"--{option} does not go with: vizattn bundle {args.action}")
    folders = [_bundle_in(folder) for folder in args.folders]
    status: int = {"show": _show, "diff": _diff, "merge": _merge, "average": _average}[args.action](args, folders)
    return status


def _bundle_in(folder: Path) -> Path:
    """The bundle that a run left in its work directory, or the folder itself."""
    return folder / "bundle" if (folder / "bundle" / "adapter_config.json").is_file() else folder


def _show(args: argparse.Namespace, folders: Sequence[Path]) -> int:
    from vizattn.adapters import bundle_summary
    from vizattn.errors import VizattnError

    if args.weights and not args.load:
        raise VizattnError("--weights goes with: vizattn bundle show --load")
    found = bundle_summary(folders[0])
    if args.load:
        found["checks"].append(_loads(folders[0], args.weights))
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(_facts(found))
    return 0 if all(holds for _, holds, _ in found["checks"]) else 1


def _loads(folder: Path, weights: str | None) -> tuple[str, bool, str]:
    from vizattn.adapters import create_from_bundle
    from vizattn.errors import VizattnError

    try:
        create_from_bundle(folder, weights)
        return "loads onto its backbone", True, ""
    except VizattnError as error:
        return "loads onto its backbone", False, str(error)


def _facts(found: dict[str, Any]) -> str:
    rows = [("bundle", f"{found['folder']}, {found['kilobytes']:,.1f} kB, by vizattn {found['vizattn_version']}")]
    args = ", ".join(f"{name}={value!r}" for name, value in found["backbone_args"].items())
    rows.append(("backbone", found["backbone"] + (f" ({args})" if args else "")))
    for adapter in found["adapters"]:
        options = ", ".join(f"{name}={value!r}" for name, value in adapter["options"].items())
        merges = "merges" if adapter["merges"] is True else f"does not merge: {adapter['merges']}"
        rows.append(("adapter", f"{adapter['method']}({options}), {merges}"))
    if found["segmenter"]:
        rows.append(("head", ", ".join(f"{name}={value!r}" for name, value in found["segmenter"].items())))
    parameters = ", ".join(f"{count:,} in {name}" for name, count in found["parameters"].items() if count)
    rows.append(("numbers", parameters or "none can be read"))
    names = found["class_names"] or ["names are not in it"]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    rows.append(("classes", f"{found['num_classes']}: {shown}"))
    size = found["preprocessing"].get("input_size")
    rows.append(("images", f"{size[1]} x {size[2]}" if isinstance(size, list | tuple) and len(size) == 3 else "-"))
    for name, value in found["metadata"].items():
        if name not in ("config", "palette"):
            rows.append((name, json.dumps(value, ensure_ascii=False)))
    for what, holds, why in found["checks"]:
        rows.append((what, "yes" if holds and not why else f"{'yes' if holds else 'NO'}: {why}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _diff(args: argparse.Namespace, folders: Sequence[Path]) -> int:
    from vizattn.adapters import compare_bundles

    from .text import columns

    found = compare_bundles(*folders)
    differ = bool(found["config"] or found["tensors"])
    if args.json:
        print(json.dumps(found, indent=2))
        return int(differ)
    for rows in found.values():
        if rows:
            shown = [{key: _cell(value) for key, value in _row(row).items()} for row in rows[:_SHOWN]]
            print(columns(shown))
            print(f"... and {len(rows) - _SHOWN} more: --json shows all\n" if len(rows) > _SHOWN else "")
    if not differ:
        print("They are the same.")
    return int(differ)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A tensor's row with the same columns whether it can be compared or not."""
    if "option" in row:
        return row
    shapes = ["none" if shape is None else str(tuple(shape)) for shape in row.get("shapes", ())]
    return {
        "tensor": row["tensor"],
        "largest difference": row.get("largest"),
        "relative": row.get("relative"),
        "shapes": " and ".join(shapes) or "the same",
    }


def _cell(value: Any) -> Any:
    text = value if isinstance(value, float | None) else str(value)
    return f"{text[:57]}..." if isinstance(text, str) and len(text) > 60 else text


def _merge(args: argparse.Namespace, folders: Sequence[Path]) -> int:
    from vizattn.adapters import read_bundle
    from vizattn.engine.merge import merge_bundle
    from vizattn.files import explain_disk_errors

    with explain_disk_errors(args.out, "choose another folder with --out"):
        difference = merge_bundle(folders[0], args.out, args.weights)
    files = "model.safetensors and model.json"
    print(f"Written to {args.out}: {files}; its logits differ from the bundle's by {difference:.1e} at most.")
    if read_bundle(folders[0])["segmenter"] is None:
        print(f'In Python: timm.create_model("local-dir:{args.out}", pretrained=True)')
    return 0


def _average(args: argparse.Namespace, folders: Sequence[Path]) -> int:
    from vizattn.adapters import average_bundles
    from vizattn.files import explain_disk_errors

    with explain_disk_errors(args.out, "choose another folder with --out"):
        average_bundles(folders, args.out, args.shares)
    print(f"Written to {args.out}: the average of {len(folders)} bundles. Measure it: vizattn eval --bundle {args.out}")
    return 0
