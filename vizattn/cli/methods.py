"""What `vizattn list --adapters` and `vizattn info` say of an adapter: all of it is read from its options dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from typing import Any

from torch import nn

import vizattn
from vizattn.adapters.base import METHODS
from vizattn.errors import VizattnError

__all__ = ["fitting_methods", "method_options", "method_summary"]


def method_summary(name: str) -> dict[str, Any]:
    """One row of the list of adapters."""
    method: Any = METHODS[name]
    return {
        "name": name,
        "merges": method.mergeable is True,
        "hierarchical": method.hierarchical,
        "cached": method.cache_level or "no",
        "summary": (inspect.getdoc(method) or "").split("\n")[0],
    }


def method_options(name: str) -> list[dict[str, Any]]:
    """Name, type, default and help of each option; the help is the string that stands below the field."""
    texts = _texts_below_fields(METHODS[name])
    return [
        {
            "option": field.name,
            "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "help": texts.get(field.name, ""),
        }
        for field in dataclasses.fields(METHODS[name])
    ]


def fitting_methods(model: nn.Module) -> dict[str, str | None]:
    """Each adapter, with None if it attaches to `model` with its default options, else the reason why not."""
    reasons: dict[str, str | None] = {}
    for name in vizattn.list_adapters():
        try:
            vizattn.detach(vizattn.attach(model, name))
            reasons[name] = None
        except VizattnError as error:
            reasons[name] = str(error)
    return reasons


def _texts_below_fields(method: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for field, below in itertools.pairwise(body):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[field.target.id] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
    return texts
