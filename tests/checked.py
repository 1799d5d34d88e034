"""What can be said of code in documents that does not run here: whether the names and options it uses exist."""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import shlex
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import timm

import vizattn
from vizattn.adapters import make_options
from vizattn.cli import COMMANDS, main
from vizattn.engine.config import apply_overrides, parse_overrides, resolve_config
from vizattn.engine.recipes import find_recipe, load_recipe

ROOT = Path(__file__).parents[1]
#: Libraries that a page may show code of though this project does not depend on them.
OTHERS = {"mmseg", "peft"}
#: Programs whose arguments nobody here can check.
FOREIGN = {"cat", "cd", "curl", "git", "hf", "kill", "ls", "source"}


def check_python(code: str, known: Mapping[str, Any], place: str) -> set[str]:
    """Check a block against the names that exist before it; returns the names that it defines.

    Raises:
        AssertionError: Something it uses does not exist.
    """
    tree = ast.parse(code, place)
    values = {name: value for name, value in known.items() if isinstance(value, types.ModuleType)}
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            values |= _imported(node, place)
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            assert node.id in defined or node.id in known or hasattr(builtins, node.id), f"{place}: no name {node.id!r}"
        elif isinstance(node, ast.Attribute):
            _value(node, values, place)
        elif isinstance(node, ast.Call):
            _check_call(node, _value(node.func, values, place), place)
    return defined


def _imported(node: ast.Import | ast.ImportFrom, place: str) -> dict[str, Any]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
    if all(name.partition(".")[0] in OTHERS and not importlib.util.find_spec(name.partition(".")[0]) for name in names):
        return {}
    modules = [importlib.import_module(name) for name in names]
    if isinstance(node, ast.Import):
        tops = [importlib.import_module(name if alias.asname else name.partition(".")[0])
                for name, alias in zip(names, node.names, strict=True)]  # fmt: skip
        return {alias.asname or alias.name.partition(".")[0]: top for alias, top in zip(node.names, tops, strict=True)}
    found = {}
    for alias in node.names:
        if not hasattr(modules[0], alias.name):
            importlib.import_module(f"{names[0]}.{alias.name}")
        found[alias.asname or alias.name] = getattr(modules[0], alias.name)
    return found


def _value(node: ast.expr, values: Mapping[str, Any], place: str) -> Any:
    """What a dotted name stands for, if it begins with a module or something imported; else None."""
    if isinstance(node, ast.Name):
        return values.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _value(node.value, values, place)
    if not isinstance(owner, types.ModuleType | type):
        return None
    assert hasattr(owner, node.attr), f"{place}: {owner.__name__} has no {node.attr!r}"
    return getattr(owner, node.attr)


def _check_call(node: ast.Call, function: Any, place: str) -> None:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    literals = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
    if function is timm.create_model and literals and isinstance(literals[0], str):
        _check_backbone(literals[0], place)
    elif function is vizattn.attach and len(literals) > 1 and isinstance(literals[1], str):
        make_options(literals[1], {k: ast.literal_eval(v) for k, v in keywords.items() if k != "keep_original"})
    elif callable(function):
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # written in C
            return
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            odd = set(keywords) - {p.name for p in parameters}
            assert not odd, f"{place}: {function.__name__} has no argument {', '.join(sorted(odd))}"


def _check_backbone(name: str, place: str) -> None:
    if ":" not in name:  # hf-hub:, local-dir:
        weights = set(timm.list_pretrained()) if "." in name else set(timm.list_models())
        assert name in weights, f"{place}: timm knows no {name!r}"


def check_commands(code: str, place: str) -> None:
    """Check that each command of a block is one, with the options that it has.

    Raises:
        AssertionError: An unknown program, target, extra, recipe or backbone.
        VizattnError: An option of a recipe that does not exist.
    """
    code = re.sub(r"<< '(\w+)'\n.*?^\1$", "", code, flags=re.M | re.S)  # what is written into a file
    for line in (line.strip() for line in code.replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):  # NAME=value program ...
            words = words[1:]
        if not words:
            continue
        where = f"{place}: {line}"
        if words[0] == "torchrun" or words[:2] == ["python", "-m"]:
            words = words[words.index("-m") + 1 :]
        words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&", "&&")), len(words))]
        if words[0] == "vizattn":
            _check_vizattn(words[1:], where)
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), where
        elif words[0] == "pip":
            extras = re.search(r"\[([\w,]+)\]", words[-1])
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
            assert words[1] == "install" and (not extras or set(extras[1].split(",")) <= set(known)), where
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), where
        else:
            assert words[0] in FOREIGN, f"{where}: an unknown program"


def _check_vizattn(argv: list[str], where: str) -> None:
    assert argv[0] in COMMANDS, where
    module = importlib.import_module(f"vizattn.cli.{argv[0]}")
    parsed: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        parsed.append(args)
        return 0

    with mock.patch.object(module, "run", run):
        try:
            status = main(argv)
        except SystemExit as end:
            status = int(end.code or 0)
    assert status == 0 and (parsed or "--help" in argv), where
    for args in parsed:
        recipe = getattr(args, "config", None)
        if argv[0] == "train" and recipe:
            config = load_recipe(find_recipe(recipe))
            resolve_config(apply_overrides(config, parse_overrides(args.cfg_options or [])))
        names = getattr(args, "model", None) or getattr(args, "backbone", None) or []
        for name in [names] if isinstance(names, str) else filter(None, names):
            _check_backbone(name, where)
