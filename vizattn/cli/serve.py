"""Serve a trained model on this machine: a page to try pictures on, and a JSON endpoint, POST /predict."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn serve`."""
    parser.add_argument(
        "--bundle",
        required=True,
        type=Path,
        metavar="DIR",
        help="a bundle, or the work directory of a run",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, which this machine alone reaches")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0: any that is free")
    parser.add_argument(
        "--weights", metavar="FILE", help="the pretrained weights of the bundle's backbone, got by hand"
    )
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from vizattn.engine.serving import need_packages

    need_packages()
    from vizattn.engine.build import choose_device
    from vizattn.engine.evaluate import load_trained
    from vizattn.engine.serving.app import create_app
    from vizattn.engine.serving.server import bind, is_loopback, make_server

    listening = bind(args.host, args.port)  # before what takes long
    trained = load_trained(args.bundle, args.weights)
    trained.model.to(choose_device(args.device))
    address, port = listening.getsockname()[:2]
    private = is_loopback(address)
    hosts = {"localhost", "127.0.0.1", "::1", args.host.lower(), address} if private else None
    folder = args.bundle.resolve()
    name = folder.parent.name if folder.name in ("bundle", "model") else folder.stem
    app = create_app(trained, name or "vizattn", hosts=hosts)
    if not private:
        print("Everybody who reaches this machine may use the server: it asks for no password.", file=sys.stderr)
    print(f"Serving at http://{f'[{address}]' if ':' in address else address}:{port}  (Ctrl-C ends it)", flush=True)
    try:
        make_server(app).run(sockets=[listening])
    except KeyboardInterrupt:
        print("Ended.", file=sys.stderr)
    return 0
