"""A run's configuration: one table of every option with its default, and the checks of what a user gives.

A recipe is a Python file of plain literals (see `vizattn.engine.recipes`). What it leaves out is filled in from
`options_of` its task; an option that is not in that table, has the wrong type or is out of range raises `VizattnError`.
"""

from __future__ import annotations

import ast
import copy
import json
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vizattn.engine.options import BY_TASK, DATA_OPTIONS, OFF_BY_DEFAULT, REQUIRED, TASKS, Option, options_of
from vizattn.errors import VizattnError, unknown

__all__ = ["apply_overrides", "dump_config", "parse_overrides", "resolve_config"]

_NONE = type(None)
_OPEN_SECTIONS = ("model", "head")
"""Whatever they hold is checked by timm.create_model and by the head."""


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every default filled in and every value checked.

    Raises:
        VizattnError: An unknown option, a wrong type, a value that is not allowed, or a missing `model.name`.
    """
    if not isinstance(config, Mapping):
        raise VizattnError(f"A recipe is a dict of options, not a {type(config).__name__}.")
    given = {str(key): _plain(str(key), value) for key, value in config.items() if not str(key).startswith("_")}
    task = given.get("task", TASKS[0])
    _checked("task", task, Option(TASKS[0], (str,), TASKS))
    options = options_of(task)
    top = {name.split(".")[0] for name in options}
    for key in given:
        if key not in top:
            raise _not_an_option(key, top, task)
    resolved: dict[str, Any] = {}
    for name, option in options.items():
        section, _, key = name.partition(".")
        if not key:
            resolved[name] = _checked(name, given.get(name, option.default), option)
        elif section not in resolved:
            resolved[section] = _resolve_section(section, given, options, task)
    _check_adapters(resolved["adapter"])
    warmup, epochs = resolved["schedule"]["warmup_epochs"], resolved["schedule"]["epochs"]
    if warmup and warmup >= epochs:
        raise VizattnError(
            f"Option schedule.warmup_epochs is {warmup}, but the whole run has {epochs} epochs "
            "(schedule.epochs): the warm-up must be shorter, as by --cfg-options schedule.warmup_epochs=0."
        )
    return resolved


def _plain(name: str, value: Any) -> Any:
    """A copy with lists for tuples, as JSON gives them back: a recipe equals what its `config.json` says."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(f"{name}.{key}", entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}.{place}", entry) for place, entry in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise VizattnError(
        f"Option {name} must be made of numbers, strings, True, False, None, lists and dicts with names, not {value!r}."
    )


def _not_an_option(name: str, known: Iterable[str], task: str) -> VizattnError:
    """The error for an option that `task` does not have; another one may."""
    for other, options in BY_TASK.items():
        if any(option == name or option.startswith(f"{name}.") for option in options):
            return VizattnError(f"Option {name} is for {other}, but the recipe's task is {task}.")
    return unknown("option", name, known)


def _resolve_section(
    section: str, given: Mapping[str, Any], options: Mapping[str, Option], task: str
) -> dict[str, Any] | None:
    values = given.get(section, {})
    if (values is None and section in OFF_BY_DEFAULT) or (section in OFF_BY_DEFAULT and section not in given):
        return None
    if not isinstance(values, Mapping):
        raise VizattnError(f"Option {section} must be a dict of options, not {values!r}.")
    table = {name.partition(".")[2]: option for name, option in options.items() if name.startswith(f"{section}.")}
    further = DATA_OPTIONS if section == "data" else {}
    for key in values:
        if section not in _OPEN_SECTIONS and key not in table and key not in further:
            raise _not_an_option(f"{section}.{key}", [f"{section}.{known}" for known in {*table, *further}], task)
    resolved = {}
    for key, option in table.items():
        value = values.get(key, option.default)
        if value is REQUIRED:
            raise VizattnError(f"The recipe needs {section}.{key}.")
        resolved[key] = _checked(f"{section}.{key}", copy.copy(value), option)
    for key, value in values.items():
        if key not in table:
            resolved[key] = _checked(f"{section}.{key}", value, further[key]) if key in further else value
    return resolved


def _checked(name: str, value: Any, option: Option) -> Any:
    if float in option.types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    is_type = any(type(value) is kind for kind in option.types)
    if not is_type and option.choices is None:
        kinds = " or ".join("None" if kind is _NONE else kind.__name__ for kind in option.types)
        raise VizattnError(f"Option {name} must be {kinds}, not {value!r}.")
    if option.choices is not None:
        choices = list(option.choices() if callable(option.choices) else option.choices)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            if isinstance(value, str) and len(choices) > 8:
                raise unknown(f"{name}", value, choices)
            raise VizattnError(f"Option {name} must be one of {', '.join(map(repr, choices))}, not {value!r}.")
    for bound, wrong, words in (
        (option.least, operator.lt, "at least"),
        (option.above, operator.le, "above"),
        (option.most, operator.gt, "at most"),
    ):
        if value is not None and bound is not None and wrong(value, bound):
            raise VizattnError(f"Option {name} must be {words} {bound:g}, not {value!r}.")
    return value


def _check_adapters(adapter: dict[str, Any] | list[Any] | None) -> None:
    for entry in adapter if isinstance(adapter, list) else [adapter] if adapter is not None else []:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise VizattnError(
                f"Option adapter must name a method, as in dict(method='vpt', num_tokens=8), not {entry!r}. "
                "List the methods with: vizattn list --adapters"
            )


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["optimizer.lr=1e-3", "data.augment=light"]`` as a dict of dotted names to values.

    Values are Python literals (numbers, lists, dicts, quoted strings, None, True, False); anything else is a string.
    """
    overrides = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise VizattnError(f"--cfg-options takes NAME=VALUE, as in optimizer.lr=0.001, not {item!r}.")
        overrides[name.strip()] = _literal(text.strip())
    return overrides


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with the dotted names of `overrides` set; a number in a name is a place in a list.

    Raises:
        VizattnError: A name that leads through something that is not a section, or `config` is no dict.
    """
    if not isinstance(config, Mapping):
        raise VizattnError(f"A recipe is a dict of options, not a {type(config).__name__}.")
    changed = copy.deepcopy(dict(config))
    for name, value in overrides.items():
        *path, last = name.split(".")
        here: Any = changed
        for depth, key in enumerate(path):
            if isinstance(here, list):
                here = here[_place(here, key, name)]
            else:
                if here.get(key) is None:
                    here[key] = {}
                here = here[key]
            if not isinstance(here, dict | list):
                raise VizattnError(f"Cannot set {name}: {'.'.join(path[: depth + 1])} is {here!r}, not a section.")
        if isinstance(here, list):
            here[_place(here, last, name)] = value
        else:
            here[last] = value
    return changed


def _place(values: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(values):
        raise VizattnError(
            f"Cannot set {name}: {key!r} is not a place in a list of {len(values)} (0 to {len(values) - 1})."
        )
    return int(key)


def dump_config(config: Mapping[str, Any], path: Path) -> None:
    """Write the resolved configuration as JSON; `load_recipe` reads it back."""
    from vizattn.files import write_text

    write_text(path, json.dumps(config, indent=2) + "\n")
