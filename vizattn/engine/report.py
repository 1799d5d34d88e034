"""Self-contained HTML pages: text, tables, and figures inside the file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vizattn.files import write_text

__all__ = ["figure_html", "image_html", "page_html", "paragraph", "png_url", "table_html", "write_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, p, td, figcaption { overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
img, svg { max-width: 100%; height: auto; }
pre { overflow-x: auto; }
figure { margin: 0; text-align: center; font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .8rem; }
.grid img { width: 96px; image-rendering: pixelated; }
.wrong { color: #b00020; font-weight: 600; }
"""


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table_html(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; cells are plain text."""
    head = "".join(f"<th>{html.escape(str(h))}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def figure_html(figure: Any, title: str) -> str:
    """A matplotlib figure as an image inside the page; `title` is read out where it cannot be seen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return f'<figure><img src="{_data_url(buffer.getvalue())}" alt="{html.escape(title)}"></figure>'


def image_html(image: Any, caption: str, wrong: bool = False) -> str:
    """A PIL image with a caption, marked where it shows a mistake."""
    mark = ' class="wrong"' if wrong else ""
    picture = f'<img src="{png_url(image)}" alt="{html.escape(caption)}">'
    return f"<figure>{picture}<figcaption{mark}>{html.escape(caption)}</figcaption></figure>"


def png_url(image: Any) -> str:
    """A PIL image as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _data_url(buffer.getvalue())


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def page_html(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """One page of (heading, HTML) sections that loads nothing from anywhere."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write the page of (heading, HTML) sections as one file."""
    write_text(path, page_html(title, sections))
