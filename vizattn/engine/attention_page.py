"""Attention as pictures and as one page: each layer and head over the image, for the query that is clicked on.

Shapes: h heads, n queries, H x W grid of keys.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vizattn.engine.pictures import save_image
from vizattn.engine.report import image_html, page_html, paragraph, png_url, table_html
from vizattn.explain import AttentionMap
from vizattn.files import write_text

__all__ = ["View", "attention_html", "encode_map", "heat", "layer_picture", "stored_queries", "write_attention"]

#: Weights that differ from zero which a page holds, over all layers; and weights of one layer in all.
PAGE_BUDGET, LAYER_BUDGET = 12 << 20, 24 << 20
#: Pixels of the longer side of pictures, at least.
SHOWN = 224


@dataclass(frozen=True)
class View:
    """What the page shows."""

    title: str
    picture: Image.Image
    """The image as the model sees it."""
    maps: Sequence[AttentionMap]
    """Of one image."""
    token_names: Sequence[str]
    """Of the queries of the layers that have no place, the last ones where there are more."""
    predictions: Sequence[tuple[str, str]]
    """Class and probability (of a segmenter: share of the pixels), best first."""
    measure: str
    """What is said of the classes: probability, or share."""
    whole: Sequence[tuple[str, np.ndarray]]
    """Maps (H, W) of the model as a whole, by name: rollout, relevance."""


def write_attention(view: View, folder: Path) -> list[Path]:
    """Write `index.html`, and a picture for each layer and each map of the whole model.

    Args:
        view: What is shown.
        folder: Made if it is missing.

    Returns:
        The files.

    Raises:
        OSError: They cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, (name, values) in enumerate(view.whole):
        written.append(folder / f"whole-{i}-{_file_name(name)}.png")
        save_image(heat(view.picture, values), written[-1])
    for i, attention in enumerate(view.maps):
        written.append(folder / f"layer-{i:02d}-{_file_name(attention.name)}.png")
        save_image(layer_picture(view.picture, attention), written[-1])
    write_text(folder / "index.html", attention_html(view))
    return [folder / "index.html", *written]


def attention_html(view: View) -> str:
    """The page by itself, which loads nothing from anywhere."""
    shown = view.picture.resize(_shown_size(view.picture), Image.Resampling.NEAREST)
    data = {
        "picture": png_url(shown),
        "width": shown.width,
        "height": shown.height,
        "colours": _base64(_colours().tobytes()),
        "layers": [encode_map(m, view.token_names, PAGE_BUDGET // len(view.maps)) for m in view.maps],
    }
    sections = [("Layers and heads", _viewer(data))]
    if view.predictions:
        sections.insert(0, ("Prediction", table_html(["class", view.measure], view.predictions)))
    if view.whole:
        figures = "".join(image_html(heat(view.picture, values), name) for name, values in view.whole)
        sections.append(("Through all layers", f'<div class="whole">{figures}</div>'))
    return page_html(view.title, sections)


def heat(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """The picture, darkened, with values (H, W) over it from black (0) over red to yellow (the largest).

    Small pictures are enlarged; each value is a rectangle.
    """
    size = _shown_size(picture)
    values = values.clip(min=0)
    shades = _colours()[(255 * values / (values.max() or 1)).round().astype(np.uint8)]
    over = Image.fromarray(shades).resize(size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), over, 0.6)


def layer_picture(picture: Image.Image, attention: AttentionMap, columns: int = 6) -> Image.Image:
    """The mean over heads, then each head: of the class token or learnt queries, or else what places receive."""
    weights = attention.of_token() if attention.query_prefix else attention.mean_received()
    each = weights[0].float().cpu().numpy()
    tiles = [heat(picture, values) for values in (each.mean(0), *each)]
    gap, (width, height) = 4, tiles[0].size
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def stored_queries(attention: AttentionMap, budget: int) -> int:
    """The distance of the queries that a page keeps along each axis, so that it stays within its size.

    Args:
        attention: Its weights that are not zero count, by a sample.
        budget: How many of them may be kept.
    """
    height, width = attention.query_grid
    if height * width == 0:
        return 1
    sample = torch.linspace(attention.query_prefix, attention.queries - 1, min(8, height * width)).long()
    share = float((attention.weights(sample)[0] > 0).float().mean())
    distance = 1
    while True:
        count = -(-height // distance) * -(-width // distance) * attention.heads * attention.grid[0] * attention.grid[1]
        if (count <= LAYER_BUDGET and count * share <= budget) or distance >= max(height, width):
            return distance
        distance += 1


def encode_map(attention: AttentionMap, token_names: Sequence[str], budget: int) -> dict[str, Any]:
    """A layer as the page reads it.

    Its rows are: what places receive; what the named tokens attend to; what places attend to, every `distance`-th of
    each axis. Weights are bytes, in units of a 255th of the largest of their row and head.
    """
    distance = stored_queries(attention, budget)
    height, width = attention.query_grid
    if height * width == 0:
        tokens = [f"learnt query {i + 1}" for i in range(attention.query_prefix)]
        if attention.query_prefix == 1:
            tokens = ["the learnt query of each head"]
    else:
        tokens = list(token_names)[-attention.query_prefix :] if attention.query_prefix else []
    first = attention.query_prefix - len(tokens)
    places = [
        attention.query_prefix + y * width + x for y in range(0, height, distance) for x in range(0, width, distance)
    ]
    index = torch.tensor([*range(first, attention.query_prefix), *places])
    parts = [attention.mean_received()[0].flatten(1).unsqueeze(1)]  # h, n, H * W
    away = [torch.zeros(attention.heads, 1)]
    step = max(1, LAYER_BUDGET // (attention.heads * attention.keys) // 4)
    for chunk in index.split(step):
        weights = attention.weights(chunk)[0]
        on_grid = attention.on_grid(weights).flatten(2)
        parts.append(on_grid)
        away.append((weights.sum(-1) - on_grid.sum(-1)).cpu())
    weights = torch.cat(parts, dim=1).float().cpu().clamp(min=0)
    largest = weights.amax(-1)
    rows = (255 * weights / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)).round().byte()
    return {
        "name": attention.name,
        "kind": attention.kind,
        "heads": attention.heads,
        "grid": list(attention.grid),
        "queries": [height, width],
        "distance": distance,
        "tokens": tokens,
        "sums": attention.kind != "linear",
        "rows": _base64(zlib.compress(rows.numpy().tobytes(), 6)),
        "largest": _base64(largest.numpy().astype("<f4").tobytes()),
        "away": _base64(torch.cat(away, dim=1).clamp(min=0).numpy().astype("<f4").tobytes()),
    }


def _viewer(data: dict[str, Any]) -> str:
    # "<" is written as an escape, so that no name can end the element.
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    script = (files("vizattn.engine") / "attention_page.js").read_text("utf-8")
    style = (files("vizattn.engine") / "attention_page.css").read_text("utf-8")
    controls = """
<noscript><p>Choosing needs JavaScript; the pictures beside this page do not.</p></noscript>
<form id="controls">
<label>Layer <select id="layer"></select></label>
<label>Head <select id="head"></select></label>
<label>Query <select id="query"></select></label>
</form>
<canvas id="view" tabindex="0" role="img" aria-describedby="state"></canvas>
<p id="state" aria-live="polite"></p>
<div id="heads" aria-label="heads"></div>
"""
    return (
        f"<style>{style}</style>{controls}"
        + paragraph(
            "Click on the picture to see what that place attends to; the arrow keys move the place. Bright is the "
            "largest weight of what is shown. The row of small pictures has a head each."
        )
        + f'<script type="application/json" id="data">{text}</script><script>{script}</script>'
    )


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    factor = max(1, -(-SHOWN // max(picture.size)))
    return picture.width * factor, picture.height * factor


def _colours() -> np.ndarray:
    """256 colours (256, 3) of matplotlib's inferno."""
    from matplotlib import colormaps

    return (255 * colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "map"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
