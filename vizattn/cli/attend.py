"""Show what a model looks at: overlays for each layer, and one page to choose layer, head and place on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn attend`."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument("--model", metavar="NAME", help="a backbone with the weights and classes it is published with")
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="or a bundle, or the work directory or a checkpoint of a run"
    )
    parser.add_argument("--weights", metavar="FILE", help="the backbone's published weights, got by hand")
    parser.add_argument(
        "--out", type=Path, default=Path("attention"), metavar="DIR", help="what is written goes there: %(default)s"
    )
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Write the page and the pictures, and print where they are."""
    from vizattn.engine.attend import attention_view, load_pretrained
    from vizattn.engine.attention_page import write_attention
    from vizattn.engine.build import choose_device
    from vizattn.engine.evaluate import load_trained
    from vizattn.engine.predict import read_image
    from vizattn.errors import VizattnError
    from vizattn.files import explain_disk_errors

    if args.model is None and args.bundle is None:
        raise VizattnError("Name a backbone with --model NAME, or what was trained with --bundle DIR.")
    device = choose_device(args.device)
    try:
        image = read_image(args.image)
    except VizattnError as error:
        raise VizattnError(f"Cannot read {args.image}: {error}.") from error
    if args.out.resolve() == args.image.resolve().parent and args.image.name.startswith(("layer-", "whole-")):
        raise VizattnError(f"{args.image} could be overwritten by what is shown of it: choose another --out DIR.")
    if args.bundle is not None:
        trained = load_trained(args.bundle, args.weights)
        _check_name(trained.model, args.model, args.bundle)
    else:
        trained = load_pretrained(args.model, args.weights)
    trained.model.to(device)
    view = attention_view(trained, image, args.image.name)
    with explain_disk_errors(args.out, "choose another folder with --out"):
        written = write_attention(view, args.out)
    for name, share in view.predictions:
        print(f"{share:>7}  {name}")
    print(f"{written[0]}  the page; with {len(written) - 1} pictures beside it")
    return 0


def _check_name(model: Any, name: str | None, bundle: Path) -> None:
    from vizattn.adapters.anatomy import core
    from vizattn.errors import VizattnError

    found = (getattr(core(model), "pretrained_cfg", None) or {}).get("architecture")
    if name is not None and name.split("/")[-1].split(".")[0] != found:
        raise VizattnError(f"What was trained in {bundle} is a {found}, not a {name}: leave --model out.")
