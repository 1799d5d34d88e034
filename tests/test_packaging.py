"""The build configuration lists what the repository holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import vizattn
from vizattn.attention import native

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def listed_packages() -> set[str]:
    block = re.search(r"^packages = \[(.*?)^\]", PYPROJECT, flags=re.MULTILINE | re.DOTALL)
    assert block
    return set(re.findall(r'"([\w.]+)"', block[1]))


def test_every_package_folder_is_listed() -> None:
    folders = {init.parent for top in ("vizattn", "models", "configs") for init in (ROOT / top).rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names = {name if name.split(".")[0] == "vizattn" else f"vizattn.{name}" for name in names}
    assert listed_packages() == names | {"vizattn_cli"}


def test_every_folder_of_recipes_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "configs").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_weights_are_package_data_and_small() -> None:
    packed = list((ROOT / "vizattn" / "weights").glob("*.safetensors"))
    assert packed, "the pretrained backbone is missing"
    assert all(path.stat().st_size <= 2_500_000 for path in packed)
    assert '"vizattn.weights" = ["*.safetensors", "*.json"]' in PYPROJECT


def test_version_is_stated_once() -> None:
    assert importlib.metadata.version("vizattn") == vizattn.__version__
    assert f"## [{vizattn.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_the_library_is_compiled_from_these_sources() -> None:
    """Where it is not, attention is slower by several times; an old one is not used, and gives no error either."""
    if os.environ.get("VIZATTN_NATIVE") == "0":
        pytest.skip("the library is not wanted")
    assert native.library is not None, "install again: pip install --editable ."
    newest = max(path.stat().st_mtime for path in (ROOT / "vizattn" / "attention" / "csrc").iterdir())
    compiled = Path(native.library._name)
    if ROOT in compiled.parents:
        assert compiled.stat().st_mtime >= newest, "sources changed since: pip install --editable ."


def test_tools_are_a_few_lines_over_the_command_line() -> None:
    for name, command in {"train": "train", "eval": "eval", "predict": "predict", "benchmark": "bench"}.items():
        lines = (ROOT / "tools" / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 12 and f'main(["{command}", *sys.argv[1:]])' in "\n".join(lines), name


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """Such as a clone of this repository, seen from the folder that holds it."""
    if not Path(sysconfig.get_path("purelib"), "vizattn_editable_first.pth").is_file():
        pytest.skip("this environment was not made by the Makefile")
    (tmp_path / "vizattn").mkdir()
    code = "import vizattn; print(vizattn.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == Path(vizattn.__file__)
