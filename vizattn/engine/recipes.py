"""Recipes: find them by name in the package or by path, and read them."""

from __future__ import annotations

import ast
import json
from importlib import resources
from pathlib import Path
from typing import Any

from vizattn.errors import VizattnError, unknown

__all__ = ["find_recipe", "list_recipes", "load_recipe", "recipe_name", "recipe_title"]


def _packaged() -> Path:
    # The package is always unpacked on disk: mmengine reads recipes by their path.
    return Path(str(resources.files("vizattn.configs")))


def list_recipes() -> list[str]:
    """Names of the packaged recipes, such as ``classification/digits_vpt``."""
    root = _packaged()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for path in root.glob("*/*.py")
        if not path.name.startswith("_")
    )


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path, by packaged name, or by the last part of a packaged name.

    Raises:
        VizattnError: There is none; the message names the closest ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    wanted = str(name).removesuffix(".py").removeprefix("configs/")
    names = list_recipes()
    matches = [known for known in names if wanted in (known, known.rpartition("/")[2])]
    if len(matches) == 1:
        return _packaged() / f"{matches[0]}.py"
    if matches:
        raise VizattnError(f"Several recipes are called {wanted!r}: {', '.join(matches)}. Give the whole name.")
    if path.suffix in (".py", ".json"):
        raise VizattnError(f"There is no recipe file {path}. List the packaged recipes with: vizattn list --recipes")
    raise unknown("recipe", name, names, "vizattn list --recipes")


def recipe_name(name: str | Path) -> str:
    """A short name for the default work directory: the file's name without its ending."""
    return Path(name).stem


def recipe_title(name: str | Path) -> str:
    """The first line of a recipe's docstring; nothing for recipes without one."""
    path = find_recipe(name)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else None
    return (text or "").partition("\n")[0]


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The recipe as a plain dict, as written: nothing filled in, nothing checked.

    Raises:
        VizattnError: It does not exist, its code fails, or it is JSON of something else than a dict.
    """
    path = find_recipe(name)
    try:
        if path.suffix == ".json":
            recipe = json.loads(path.read_text(encoding="utf-8"))
        else:
            from mmengine.config import Config

            recipe = Config.fromfile(path, lazy_import=False).to_dict()
    except Exception as error:
        raise VizattnError(f"Cannot read the recipe {path}: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, dict):
        raise VizattnError(f"The recipe {path} must be a JSON object of options, not a {type(recipe).__name__}.")
    return recipe
