"""Check a folder of images and masks before training a segmentation on it."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vizattn.data.audit import Audit

__all__ = ["add_arguments", "run"]

_SHOWN = 20  # files of one kind
_SMALL = 256  # pixels, below which an image has little for a large model to see


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn data`."""
    parser.add_argument("action", choices=("check",), help="check: read all images and masks, and say what to set")
    parser.add_argument("dir", metavar="DIR", help="the folder, in the layout of data.root in a recipe")
    parser.add_argument("--layout", default="auto", help="auto (the default), folders, voc, ade20k or cityscapes")
    parser.add_argument(
        "--reduce-zero-label", action="store_true", help="label 0 is ignored and label n is class n - 1, as on ADE20K"
    )
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report: 0 if all is well, 1 if files or labels cannot be used."""
    from pathlib import Path

    from vizattn.data.audit import audit
    from vizattn.data.class_names import names_in

    names = None if args.classes is None else names_in(Path(args.classes))
    found = audit(args.dir, layout=args.layout, reduce_zero_label=args.reduce_zero_label, class_names=names)
    print(json.dumps(found.to_dict(), indent=2) if args.json else f"{_report(found)}\n\n{_verdict(found, args)}")
    return 0 if found.ok else 1


def _report(found: Audit) -> str:
    from .text import columns

    modes = ", ".join(f"{count} of mode {mode}" for mode, count in found.mask_modes.items()) or "none"
    heights, widths = (f"{least} to {most} (median {middle})" for least, middle, most in (found.heights, found.widths))
    parts = [
        f"{found.root}\nlayout  {found.layout}\nmasks   {modes}\nheight  {heights}\nwidth   {widths}",
        columns(_rows(found)),
        _files("cannot be used", (f"{path}: {reason}" for path, reason in found.unusable.items())),
        _files("masks without an image", found.masks_without_image),
        _files(
            "masks with labels that are no class",
            (f"{path}: {', '.join(map(str, labels))}" for path, labels in found.out_of_range.items()),
        ),
        _files("masks that ignore every pixel", found.all_ignored),
        "\n".join(f"- {sentence}" for sentence in found.advice),
    ]
    return "\n\n".join(part for part in parts if part)


def _verdict(found: Audit, args: argparse.Namespace) -> str:
    """What can be used, and the command that trains on it."""
    if found.out_of_range:
        return "Not ready: training would stop at labels that are no class."
    usable = sum(split.pairs for split in found.splits.values())
    if len(found.class_names) < 2 or "train" not in found.splits:
        return "Not ready: see above."
    small = found.least_side < _SMALL
    recipe = "scenes_vit_hst" if small else "upernet_biformer_tiny"
    options = [f"data.crop_size={found.crop_size}"] if small and found.crop_size else []
    options += [f"data.layout={args.layout}"] if args.layout != "auto" else []
    options += ["data.reduce_zero_label=True"] if args.reduce_zero_label else []
    options += [f"data.class_names={found.class_names}"] if args.classes else []
    command = ["vizattn", "train", f"segmentation/{recipe}", "--data", args.dir]
    command += ["--cfg-options", *options] if options else []
    ready = f"Ready: {usable} of {usable + len(found.unusable)} images can be used. Train with, for example:"
    return f"{ready}\n  {shlex.join(command)}"


def _rows(found: Audit) -> list[dict[str, Any]]:
    """For each class and what is ignored, by split: in how many images it is, and its share of the pixels."""
    totals = {name: sum(split.pixels) + split.ignored for name, split in found.splits.items()}

    def shares(pixels: dict[str, int]) -> dict[str, float | None]:
        return {f"{name} %": 100 * pixels[name] / total if total else None for name, total in totals.items()}

    rows: list[dict[str, Any]] = []
    for label, class_name in enumerate(found.class_names):
        images = {f"{name} images": split.images[label] for name, split in found.splits.items()}
        pixels = {name: split.pixels[label] for name, split in found.splits.items()}
        rows.append({"class": label, "name": class_name, **images, **shares(pixels)})
    images = {f"{name} images": split.pairs for name, split in found.splits.items()}
    rows.append({"class": None, "name": "(ignored; all images)", **images})
    rows[-1] |= shares({name: split.ignored for name, split in found.splits.items()})
    return rows


def _files(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    shown = lines[:_SHOWN] + ([f"... and {len(lines) - _SHOWN} more: --json shows all"] if len(lines) > _SHOWN else [])
    return "\n".join([f"{title}: {len(lines)}", *(f"  {line}" for line in shown)]) if lines else ""
