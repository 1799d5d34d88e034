"""Write the diagrams of the documentation, `docs/pictures/*.svg`: `python tools/make_diagrams.py [--check]`.

Those of the attentions show what the code does: the keys are those that get a weight. With --check nothing is written,
and what is stale is named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adapter_pictures import adapter_pictures
from attention_pictures import attention_pictures

from vizattn.files import write_text

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"


def diagrams() -> dict[Path, str]:
    """The text of each file."""
    return {FOLDER / f"{name}.svg": p.svg() for name, p in {**adapter_pictures(), **attention_pictures()}.items()}


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is stale; exit status 1 if something is")
    options = parser.parse_args()
    wanted = diagrams()
    if options.check:
        there = {path: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
        stale = sorted(path.name for path in {*wanted, *there} if wanted.get(path) != there.get(path))
        print(
            "\n".join([*stale, "Stale: run python tools/make_diagrams.py"]) if stale else "The diagrams are up to date."
        )
        return int(bool(stale))
    for path, text in wanted.items():
        write_text(path, text)
    print(f"{len(wanted)} diagrams, {sum(len(text) for text in wanted.values()) / 1000:.0f} kB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
