"""Put a bundle or a trained model on the Hugging Face hub, with a card that says what it is.

The card, README.md, is written beside the files; one that you changed is kept. A repository that does not exist is
made, a public one: make it on the hub first if it shall be private. Log in with `hf auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn publish`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="a bundle, a model folder, or a run's work directory")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the repository on the hub")
    parser.add_argument("--dry-run", metavar="FOLDER", type=Path, help="write there what would be uploaded, no more")


def run(args: argparse.Namespace) -> int:
    """Write the card and upload, or write everything to a folder."""
    import tempfile

    from vizattn.engine.publish import exported, prepare, upload
    from vizattn.errors import VizattnError
    from vizattn.files import explain_disk_errors, write_text

    source = exported(args.folder)
    if args.dry_run:
        with explain_disk_errors(args.dry_run, "choose another folder for --dry-run"):
            prepare(source, args.dry_run, args.repo)
        print(f"Written to {args.dry_run}: {', '.join(sorted(path.name for path in args.dry_run.iterdir()))}.")
        return 0
    if not args.repo:
        raise VizattnError("Where to? Name a repository by --repo OWNER/NAME, or try it with --dry-run FOLDER.")
    with tempfile.TemporaryDirectory() as staged:
        card = prepare(source, Path(staged), args.repo)
        with explain_disk_errors(source, "copy it to a folder that can be written to"):
            write_text(source / "README.md", card)
        print(f"Published: {upload(Path(staged), args.repo)}")
    return 0
