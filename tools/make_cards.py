"""Write the model cards, the index of the zoo and `vizattn/weights/costs.json`: `python tools/make_cards.py [--check]`.

They follow from the registry, the manifest, the recipes, the papers' figures (`vizattn/weights/published.json`), what
was measured here (`model_cards/results.csv`) and the families' own texts (`model_cards/text`). With --check nothing is
written, and what is stale is named.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

import cards
import zoo
import zoo_index
from results import ROOT

from vizattn.errors import VizattnError
from vizattn.files import replacing, write_text

PLOT = Path("model_cards/accuracy.svg")


def pages(backbones: list[zoo.Backbone]) -> dict[Path, str]:
    """The text of each file, by its path in the repository."""
    costs = {b.name: {"parameters": b.parameters, "gmacs": b.gmacs} for b in sorted(backbones, key=lambda b: b.name)}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cost)}" for name, cost in costs.items())
    return {
        Path("vizattn/weights/costs.json"): f"{{\n{lines}\n}}\n",
        Path("model_cards/README.md"): zoo_index.index_markdown(backbones),
        Path("model_cards/index.html"): zoo_index.index_html(backbones),
        **{
            Path("model_cards") / f"{family}.md": cards.card(family, members)
            for family, members in zoo.families(backbones).items()
        },
    }


def stale(root: Path, wanted: dict[Path, str], points: list[dict[str, object]]) -> list[str]:
    """What differs below `root`: a line a file, with the first line that is wrong; the plot is compared by its data."""
    found = []
    for path, text in wanted.items():
        old = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
        if old != text:
            lines = difflib.unified_diff(old.splitlines(), text.splitlines(), lineterm="", n=0)
            changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
            found.append(f"{path}: {changed[0] if changed else 'the end of the file'}")
    if zoo_index.points_in(root / PLOT) != points:
        found.append(f"{PLOT}: other points")
    known = {path.name for path in wanted}
    found += [
        f"{path.relative_to(root)}: no such family"
        for path in sorted((root / "model_cards").glob("*.md"))
        if path.name not in known
    ]
    return found


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is stale; exit status 1 if something is")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository to write into (default: this one)")
    options = parser.parse_args()
    try:
        backbones = zoo.read_zoo()
    except VizattnError as error:
        print(error, file=sys.stderr)
        return 1
    wanted, points = pages(backbones), zoo_index.plot_points(backbones)
    if options.check:
        found = stale(options.root, wanted, points)
        print("\n".join([*found, "Stale: run `make cards` and commit."] if found else ["The cards are up to date."]))
        return int(bool(found))
    for path, text in wanted.items():
        (options.root / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(options.root / path, text)
    if zoo_index.points_in(options.root / PLOT) != points:
        with replacing(options.root / PLOT) as temporary:
            zoo_index.draw_plot(points, temporary)
    print(f"{len(wanted)} files and a plot of {len(points)} points.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
