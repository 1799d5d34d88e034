"""Show one backbone or one adapter."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vizattn info`."""
    parser.add_argument("name", help="a backbone (ours or timm's, with or without its weights' tag) or an adapter")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    import timm

    import vizattn
    from vizattn.errors import unknown

    if args.name in vizattn.list_adapters():
        facts, show = describe_adapter(args.name), _show_adapter
    elif timm.is_model(args.name):
        facts, show = describe_backbone(args.name), _show_backbone
    else:
        names = [*vizattn.list_adapters(), *timm.list_models()]
        raise unknown("backbone or adapter", args.name, names, "vizattn list --timm, or vizattn list --adapters")
    print(json.dumps(facts, indent=2) if args.json else show(facts))
    return 0


def describe_adapter(name: str) -> dict[str, Any]:
    """All that is known of an adapter, as plain values."""
    import inspect

    from vizattn.adapters.base import METHODS

    from .methods import method_options, method_summary

    method: Any = METHODS[name]
    return {
        "adapter": name,
        "description": inspect.getdoc(method),
        "source": (inspect.getdoc(inspect.getmodule(method)) or "").split("\n")[0],
        **{key: value for key, value in method_summary(name).items() if key not in ("name", "summary")},
        "why_not_merged": None if method.mergeable is True else method.mergeable,
        "composes_with": list(method.composes_with),
        "options": method_options(name),
    }


def describe_backbone(name: str) -> dict[str, Any]:
    """All that is known of a backbone, as plain values; built without memory, so quick for any size.

    Raises:
        VizattnError: the name carries a tag of weights that do not exist.
    """
    import timm

    from vizattn.data import preprocessing_of
    from vizattn.errors import unknown

    from .backbones import build_empty, family, gmacs, parameters, summary
    from .methods import fitting_methods

    architecture, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise unknown(f"weights of {architecture}:", tag, tags)
    model: Any = build_empty(name)
    cfg = model.pretrained_cfg
    return {
        "backbone": name,
        "family": family(architecture),
        **{key: value for key, value in summary(name).items() if key != "name"},
        "parameters": parameters(model),
        "gmacs": gmacs(model, cfg["input_size"]),
        "classes": cfg["num_classes"],
        "width": model.num_features,
        "paper": cfg.get("paper_ids"),
        "tags": tags,
        "preprocessing": preprocessing_of(model),
        "features": [
            {"module": level["module"], "channels": level["num_chs"], "stride": level.get("reduction")}
            for level in getattr(model, "feature_info", [])
        ],
        "adapters": fitting_methods(model),
    }


def _show_adapter(facts: dict[str, Any]) -> str:
    from .text import columns

    facts = dict(facts)
    options, description = facts.pop("options"), facts.pop("description")
    table = columns([{**row, "default": repr(row["default"])} for row in options]) if options else "no options"
    return f"{description}\n\n{_facts(facts)}\n\n{table}"


def _show_backbone(facts: dict[str, Any]) -> str:
    from .text import columns

    facts = dict(facts)
    features, adapters = facts.pop("features"), facts.pop("adapters")
    facts["adapters"] = [name for name, reason in adapters.items() if reason is None] or "none"
    facts["preprocessing"] = ", ".join(f"{key} {value}" for key, value in facts["preprocessing"].items())
    unfit: dict[str, list[str]] = {}
    for name, reason in adapters.items():
        if reason is not None:
            unfit.setdefault(reason.removeprefix(f"Cannot attach {name!r}: "), []).append(name)
    parts = [_facts(facts), *(f"Not {', '.join(names)}: {reason}" for reason, names in unfit.items())]
    return "\n\n".join([*parts, columns(features)] if features else parts)


def _facts(facts: dict[str, Any]) -> str:
    """A line each, without those that say nothing."""
    from .text import cell

    shown = {key.replace("_", " "): cell(value) for key, value in facts.items() if value not in (None, "", [])}
    width = max(map(len, shown))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())
