"""What is known of each of our backbones: from the registry, the papers' figures, and what was measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from results import Result, newest, read_results
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

import vizattn  # noqa: F401  (registers the backbones)
from vizattn.cli.backbones import family, our_names, weights_source
from vizattn.errors import VizattnError
from vizattn.weights import published

__all__ = ["Backbone", "Weights", "families", "markdown_table", "read_zoo"]


@dataclass(frozen=True)
class Weights:
    """One set of weights, or the tag `untrained`, of a backbone."""

    name: str
    """``name.tag``."""
    cfg: Any
    source: str
    """``"packaged"``, ``"released"`` or ``"none"``."""
    published: dict[str, Any] = field(repr=False)

    @property
    def licence(self) -> str:
        """As its authors state it."""
        return self.cfg.license or "none stated"


@dataclass(frozen=True)
class Backbone:
    """A registered name; its first weights are the default ones."""

    name: str
    family: str
    parameters: int
    gmacs: float
    weights: list[Weights]
    measured: list[Result]
    """The newest of each kind, other than parameters and multiply-adds."""

    @property
    def default(self) -> Weights:
        """What the name means without a tag."""
        return self.weights[0]

    @property
    def input(self) -> str:
        """Height and width, as in ``"224 x 224"``."""
        return " x ".join(map(str, self.default.cfg.input_size[1:]))

    @property
    def speed(self) -> float | None:
        """Images a second in units of resnet50's, where it was measured."""
        return next((row.value for row in self.measured if row.metric.startswith("throughput")), None)


def read_zoo(results: Sequence[Result] | None = None) -> list[Backbone]:
    """All our backbones, by family and number of parameters.

    Raises:
        VizattnError: A backbone has not been counted yet.
    """
    rows = newest(read_results() if results is None else [*results])
    names = our_names()
    uncounted = [name for name in names if (name, "parameters") not in rows or (name, "gmacs") not in rows]
    if uncounted:
        raise VizattnError(
            f"model_cards/results.csv lacks the parameters and multiply-adds of {', '.join(uncounted)}: run "
            f"`python tools/measure_zoo.py cost`."
        )
    counts = ("parameters", "gmacs")
    zoo = [
        Backbone(
            name,
            family(name),
            int(rows[name, "parameters"].value),
            rows[name, "gmacs"].value,
            _weights_of(name),
            [row for row in rows.values() if row.backbone == name and row.metric not in counts],
        )
        for name in names
    ]
    return sorted(zoo, key=lambda backbone: (backbone.family, backbone.parameters, backbone.gmacs, backbone.name))


def _weights_of(name: str) -> list[Weights]:
    default: Any = get_pretrained_cfg(name)
    cfgs = get_arch_pretrained_cfgs(name)
    return [
        Weights(full, cfg, weights_source(cfg), published().get(full, {}))
        for full, cfg in sorted(cfgs.items(), key=lambda item: item[1].tag != default.tag)
    ]


def families(zoo: Sequence[Backbone]) -> dict[str, list[Backbone]]:
    """The backbones of each family, in their order."""
    found: dict[str, list[Backbone]] = {}
    for backbone in zoo:
        found.setdefault(backbone.family, []).append(backbone)
    return found


def module_docstring(name: str) -> str:
    """That of the module which registers `name`."""
    import sys

    return sys.modules[timm.model_entrypoint(name).__module__].__doc__ or ""


def markdown_table(rows: Sequence[dict[str, str]], numbers: Sequence[str] = ()) -> str:
    """A table of `rows`, which all have the keys of the first; without the columns that are empty in all of them."""
    keys = [key for key in rows[0] if any(row[key] for row in rows)]
    lines = [keys, ["---:" if key in numbers else "---" for key in keys]]
    lines += [[row[key] or "-" for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
