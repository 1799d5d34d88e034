"""The suites by name."""

from __future__ import annotations

import os

from vizattn.data.transfer.fgvc import FGVC
from vizattn.data.transfer.mini import VTAB_MINI, VTAB_MINI_SKIMAGE
from vizattn.data.transfer.tasks import Suite, read_suite
from vizattn.data.transfer.vtab import VTAB_1K
from vizattn.errors import unknown

__all__ = ["SUITES", "get_suite"]

SUITES = {suite.name: suite for suite in (VTAB_1K, VTAB_MINI, VTAB_MINI_SKIMAGE, FGVC)}


def get_suite(name: Suite | str | os.PathLike[str]) -> Suite:
    """A built-in suite by name, or a user's own from a JSON file, see `read_suite`; a suite is given back.

    Raises:
        VizattnError: There is no such suite; see `read_suite`.
    """
    if isinstance(name, Suite):
        return name
    text = os.fspath(name)
    if text in SUITES:
        return SUITES[text]
    if text.lower().endswith(".json") or os.path.isfile(text):
        return read_suite(text)
    raise unknown("suite (or JSON file of one)", text, SUITES)
