"""What papers report of their models, beside what this repository measures: `published.json`, by ``name.tag``.

Fields, as far as a paper has them: ``top1``, accuracy in percent on ImageNet-1k's validation images at the input size
of the default cfg (``top1_in21k`` after pretraining on ImageNet-21k); ``params_m``, million parameters; ``gmacs``,
thousand million multiply-adds; ``ade20k_miou``, percent with that segmentation head on this backbone, for one scale or
several; ``source``, the paper.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

__all__ = ["published"]


@lru_cache(maxsize=1)
def published() -> dict[str, dict[str, Any]]:
    """``name.tag`` -> the figures of its paper."""
    figures: dict[str, dict[str, Any]] = json.loads((files("vizattn.weights") / "published.json").read_text("utf-8"))
    return figures
