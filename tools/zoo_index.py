"""The index of the zoo: `README.md`, `index.html` with columns to sort by, accuracy against cost as `accuracy.svg`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import Backbone, markdown_table

__all__ = ["draw_plot", "index_html", "index_markdown", "plot_points", "points_in"]

NUMBERS = ("parameters (M)", "GMACs", "published top-1")
CHANGE = "Written by tools/make_cards.py: change the registry or results.csv, then `make cards`."


def index_rows(zoo: Sequence[Backbone]) -> list[dict[str, str]]:
    """A row a name, as text."""
    return [
        {
            "name": backbone.name,
            "family": backbone.family,
            "parameters (M)": f"{backbone.parameters / 1e6:.2f}",
            "GMACs": f"{backbone.gmacs:.{2 if backbone.gmacs >= 1 else 3}f}",
            "input": backbone.input,
            "weights": backbone.default.source,
            "published top-1": str(top1) if (top1 := top1_of(backbone)) else "",
            "licence": "" if backbone.default.source == "none" else backbone.default.licence,
        }
        for backbone in zoo
    ]


def top1_of(backbone: Backbone) -> float | None:
    """The published accuracy of the default weights."""
    return backbone.default.published.get("top1")


def index_markdown(zoo: Sequence[Backbone]) -> str:
    """`model_cards/README.md`."""
    rows = [
        {**row, "name": f"`{row['name']}`", "family": f"[{row['family']}]({row['family']}.md)"}
        for row in index_rows(zoo)
    ]
    return f"""<!-- {CHANGE} -->

# The zoo

{len(zoo)} backbones of {len({backbone.family for backbone in zoo})} families, by family and size. Parameters and \
multiply-adds (of one image of the size given) were counted here; top-1 accuracy on ImageNet-1k is what the paper \
reports for the default weights, and was not measured here. What was measured here stands in the cards, with its \
command, and in [results.csv](results.csv). [index.html](index.html), opened in a browser, sorts by any column; \
`vizattn list` shows the same on the command line, with filters.

{markdown_table(rows, NUMBERS)}

*packaged* weights ship with vizattn, *released* ones are downloaded from where they were published by \
`pretrained=True`, *none*: there are none yet.

![Published top-1 accuracy against multiply-adds](accuracy.svg)

Published accuracy against multiply-adds as counted here; hollow: pretrained on ImageNet-21k or 22k first.
"""


def index_html(zoo: Sequence[Backbone]) -> str:
    """`model_cards/index.html`: no file, font or script from elsewhere."""
    rows = index_rows(zoo)

    def cell(key: str, text: str) -> str:
        shown = html.escape(text or "-")
        if key == "family":
            shown = f'<a href="{shown}.md">{shown}</a>'
        return f"<td{number if key in NUMBERS else ''}>{shown}</td>"

    number = ' class="number"'
    head = "".join(
        f'<th{number if key in NUMBERS else ""}><button type="button">{html.escape(key)}</button></th>'
        for key in rows[0]
    )
    body = "\n".join(f"<tr>{''.join(cell(key, text) for key, text in row.items())}</tr>" for row in rows)
    return f"""<!doctype html>
<!-- {CHANGE} -->
<html lang="en">
<meta charset="utf-8">
<title>vizattn: the zoo</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
th button {{ all: unset; cursor: pointer; font-weight: bold; }}
th button:focus-visible {{ outline: 2px solid; }}
th[aria-sort=ascending] button::after {{ content: " \\2191"; }}
th[aria-sort=descending] button::after {{ content: " \\2193"; }}
</style>
<h1>The zoo</h1>
<p>Parameters and multiply-adds were counted here; top-1 on ImageNet-1k is as published and was not measured here.
A click on a column sorts by it. <label>Only names with <input id="filter" size="12"></label></p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<script>
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
const value = (row, i) => row.cells[i].textContent;
heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {{
  const down = head.ariaSort === "ascending";
  heads.forEach(other => other.ariaSort = null);
  head.ariaSort = down ? "descending" : "ascending";
  const missing = row => value(row, i) === "-";
  const order = (a, b) => head.className ? a - b : a.localeCompare(b, "en", {{numeric: true}});
  [...body.rows].sort((a, b) =>
    missing(a) - missing(b) || (down ? -1 : 1) * order(value(a, i), value(b, i))
  ).forEach(row => body.append(row));
}}));
document.querySelector("#filter").addEventListener("input", event => {{
  for (const row of body.rows) row.hidden = !value(row, 0).includes(event.target.value.trim().toLowerCase());
}});
</script>
</html>
"""


def plot_points(zoo: Sequence[Backbone]) -> list[dict[str, Any]]:
    """What the plot shows: a point for all weights with a published accuracy at the size that was counted."""
    return [
        {
            "series": _series(backbone.name),
            "name": weights.name,
            "gmacs": round(backbone.gmacs, 4),
            "top1": weights.published["top1"],
            "more_data": bool(re.search("in2[12]k", weights.cfg.tag)),
        }
        for backbone in zoo
        for weights in {
            each.published["top1"]: each for each in reversed(backbone.weights) if "top1" in each.published
        }.values()
        if weights.cfg.input_size == backbone.default.cfg.input_size
    ]


def _series(name: str) -> str:
    """``dinat_s_large_384`` -> ``dinat_s``."""
    return re.sub(r"_(va_)?(mini|tiny|small|medium|base|large|stl|[hm]\d)(_.*)?$", "", name)


def draw_plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Write `points` as a scatter plot that also holds them as text, see `points_in`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {"svg.hashsalt": "vizattn", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        colours = [plt.get_cmap("tab20")(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
        for i, series in enumerate(sorted({point["series"] for point in points})):
            own = sorted((p for p in points if p["series"] == series), key=lambda p: (p["gmacs"], p["top1"]))
            colour, marker = colours[i % len(colours)], "os^DvP*X<>p"[i % 11]
            plain = [p for p in own if not p["more_data"]]
            axes.plot(
                [p["gmacs"] for p in plain], [p["top1"] for p in plain], color=colour, marker=marker, lw=1, label=series
            )
            more = [p for p in own if p["more_data"]]
            axes.plot([p["gmacs"] for p in more], [p["top1"] for p in more], marker, color=colour, mfc="none")
        axes.set(xscale="log", xlabel="GMACs of one image, counted here", ylabel="ImageNet-1k top-1 in %, published")
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="lower right", fontsize=8)
        figure.savefig(
            path, format="svg", metadata={"Date": None, "Creator": None, "Description": json.dumps([*points])}
        )
        plt.close(figure)


def points_in(path: Path) -> list[dict[str, Any]] | None:
    """The points that a plot was drawn from."""
    if not path.is_file():
        return None
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(html.unescape(found[1])) if found else None
