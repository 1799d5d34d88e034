"""What mkdocs does not do by itself: equations become MathML, and pictures become part of the page.

An SVG inside the page takes the colour of the text around it, so that it is legible on light and on dark; as an image
of its own, on a code host, it goes by its own style, which is left out here.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

__all__ = ["on_page_content"]

EQUATION = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
PICTURE = re.compile(r'<img alt="([^"]*)" src="([^":]*\.svg)"[^>]*/?>')
STYLE = re.compile(r"<style>.*?</style>\s*", re.DOTALL)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The HTML of a page with its equations and pictures in it; called by mkdocs.

    Raises:
        OSError: A picture that does not exist.
    """
    folder, root = posixpath.dirname(page.file.dest_uri), Path(config["docs_dir"])

    def picture(match: re.Match[str]) -> str:
        path = root / posixpath.normpath(posixpath.join(folder, unescape(match[2])))
        svg = STYLE.sub("", path.read_text(encoding="utf-8"))
        if not svg.startswith("<svg"):  # a plot, with colours and names of its own
            return match[0]
        return f'<figure class="picture">{svg}<figcaption>{match[1]}</figcaption></figure>'

    return PICTURE.sub(picture, EQUATION.sub(_mathml, html))


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    return convert(unescape(match[3]).strip(), display=display)
