"""Start-up: importing, the command's help, and creating models, beside timm."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import timm

from vizattn.bench.backbones import is_ours
from vizattn.bench.case import Case, Options, Work

__all__ = ["PAIRS", "cases"]

#: Models of ours, the largest first, and timm's of equal size.
PAIRS = {
    "vit_va_large_patch16_224": "vit_large_patch16_224",
    "dinat_large": "swin_large_patch4_window7_224",
    "l2vit_base": "swin_base_patch4_window7_224",
}


def run_python(bytecode: Path, *arguments: str) -> Work:
    """Starts an interpreter, and waits for its end; byte code of the first run is there for the others."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    command = [sys.executable, *arguments]
    return Work(functools.partial(subprocess.run, command, check=True, capture_output=True, env=environment))


def create(name: str) -> Work:
    """Creates a model with its initial weights, and drops it."""
    return Work(functools.partial(timm.create_model, name))


def cases(options: Options) -> list[Case]:
    """Imports, the command line, and models."""
    assert options.folder is not None
    run = functools.partial(run_python, options.folder / "bytecode")
    imports = {
        "timm": ("-c", "import timm"),
        "vizattn": ("-c", "import vizattn"),
        "torch": ("-c", "import torch"),
    }
    commands = {
        "python": ("-c", "pass"),
        "vizattn --help": ("-c", "import vizattn_cli; vizattn_cli.main(['--help'])"),
        "vizattn --version": ("-c", "import vizattn_cli; vizattn_cli.main(['--version'])"),
        "vizattn list --json": ("-c", "import vizattn_cli; vizattn_cli.main(['list', '--json'])"),
    }
    found = [
        _case("import", name, functools.partial(run, *arguments), name == "timm", name == "vizattn")
        for name, arguments in imports.items()
    ]
    found += [
        _case("command", name, functools.partial(run, *arguments), name == "python", name != "python")
        for name, arguments in commands.items()
    ]
    for ours, theirs in PAIRS.items():
        found += [
            _case(f"create_model {ours}", name, functools.partial(create, name), name == theirs, is_ours(name))
            for name in (theirs, ours)
        ]
    return found


def _case(subject: str, name: str, build: functools.partial[Work], reference: bool, ours: bool) -> Case:
    return Case(
        group="startup",
        subject=subject,
        name=name,
        build=build,
        mode="start",
        batch=0,
        reference=reference,
        ours=ours,
        arithmetic=False,
    )
