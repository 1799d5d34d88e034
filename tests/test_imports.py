"""Imports go one way, heavy libraries are reached from one place, and `import vizattn` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each part of the package and the parts it may import; those of EVERYWHERE and the part itself always.
ALLOWED = {
    "vizattn": {"models", "adapters", "explain", "fuse", "heads"},  # vizattn/__init__.py: importing is registering
    "__main__": {"cli"},
    "fuse": {"adapters", "layers"},  # refuses models with adapters
    "layers": set(),
    "compiled": set(),
    "attention": {"layers", "compiled"},
    "models": {"attention", "layers", "weights"},
    "heads": {"layers"},
    "adapters": {"attention", "layers", "heads"},  # bundles of segmenters
    "explain": {"adapters", "attention", "layers", "heads"},
    "weights": {"attention", "layers"},
    "data": {"attention", "layers"},
    "configs": set(),
    "engine": {"data", "heads", "adapters", "explain", "weights", "attention", "layers", "configs"},
    "bench": {"data", "heads", "adapters", "weights", "attention", "layers", "fuse"},
    "cli": {"bench", "engine", "data", "heads", "adapters", "weights", "attention", "layers", "configs"},
}
EVERYWHERE = {"errors", "files", "memory", "version"}
# Third-party packages and the only places that may import them.
RESERVED = {
    "mmengine": ("vizattn/engine/",),
    "albumentations": ("vizattn/data/",),
    "peft": ("vizattn/bench/peers.py",),
    "fastapi": ("vizattn/engine/serving/app.py",),
    "uvicorn": ("vizattn/engine/serving/server.py",),
    "natten": ("vizattn/attention/neighborhood.py", "vizattn/bench/peers.py"),  # used, and measured against
}
LATE = {"mmengine", "peft", "albumentations", "wandb", "natten", "sklearn", "matplotlib", "rich"}
LATE |= {"fastapi", "uvicorn", "onnx", "onnxruntime", "onnxscript"}

FILES = sorted(path for folder in ("vizattn", "models", "configs") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """``models/vit.py`` -> ``vizattn.models.vit``; ``vizattn/cli/__init__.py`` -> ``vizattn.cli``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "vizattn" else ("vizattn", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the package a module belongs to: ``vizattn.data.folder`` -> ``data``."""
    return [*module.split("."), "vizattn"][1]


def imports(path: Path) -> set[str]:
    """The full names of all modules a file imports, wherever in the file, relative imports resolved."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from vizattn import data` names a part, `from vizattn.data import x` may name a module or a function
            found.update(f"{source}.{alias.name}" for alias in node.names) if source == "vizattn" else found.add(source)
    return found


def test_every_part_has_a_rule() -> None:
    assert {part_of(module_name(path)) for path in FILES} - EVERYWHERE <= set(ALLOWED)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in FILES:
        part = part_of(module_name(path))
        for module in imports(path):
            if module.split(".")[0] == "vizattn" and module != "vizattn":
                target = part_of(module)
                is_part = target in ALLOWED or target in EVERYWHERE
                if is_part and target not in {part} | EVERYWHERE | ALLOWED.get(part, set()):
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("package", RESERVED)
def test_reserved_packages_are_imported_in_their_place_only(package: str) -> None:
    users = [path.relative_to(ROOT).as_posix() for path in FILES if package in {m.split(".")[0] for m in imports(path)}]
    assert all(user.startswith(RESERVED[package]) for user in users), users
    if package != "mmengine":
        assert len(users) <= len(RESERVED[package]), users


def test_wandb_is_reached_through_mmengine_only() -> None:
    assert not [path for path in FILES if "wandb" in {m.split(".")[0] for m in imports(path)}]


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "vizattn" / "layers" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from ..engine import run\n    from . import y\n    from vizattn import data\n")
    assert imports(file) == {"vizattn.engine", "vizattn.layers", "vizattn.data"}


def test_importing_vizattn_loads_no_heavy_library() -> None:
    """Only modules that torch and timm do not load by themselves count (timm may bring rich by its hub client)."""
    code = (
        "import sys, timm, torch; before = set(sys.modules); import vizattn;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "vizattn" in loaded
    assert not loaded & LATE
