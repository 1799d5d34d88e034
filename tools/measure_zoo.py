"""Measure our backbones and append what comes out to `model_cards/results.csv`; `make cards` then shows it.

python tools/measure_zoo.py cost [NAME ...]       parameters and multiply-adds of one image of the native size
python tools/measure_zoo.py accuracy [NAME ...]   of the weights in the package, on the splits of their recipe's data
python tools/measure_zoo.py speed [NAME ...]      images a second in units of resnet50's, on a machine that is idle
python tools/measure_zoo.py run WORK_DIR ...      test results of training runs, each by a recipe of the package

Without names all are measured for which there is no such row yet; with names, those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import Result, append_results, measured, newest, read_results
from timm.models import get_pretrained_cfg

import vizattn  # noqa: F401  (registers the backbones)
from vizattn.bench import Options, cases_of, measure
from vizattn.cli.backbones import build_empty, gmacs, our_names, parameters, weights_source
from vizattn.errors import VizattnError, unknown

FIRST = {"cost": "gmacs", "accuracy": "glyphs accuracy val", "speed": "throughput ratio to resnet50"}
"""The metric by which a mode knows what has been measured."""


def cost(name: str, options: argparse.Namespace) -> Iterator[Result]:
    """Parameters and multiply-adds; exact, on any machine."""
    model: Any = build_empty(name)
    command = f"python tools/measure_zoo.py cost {name}"
    yield measured(name, "parameters", float(parameters(model)), "", command)
    yield measured(name, "gmacs", round(gmacs(model, model.pretrained_cfg["input_size"]), 6), "G", command)


def accuracy(name: str, options: argparse.Namespace) -> Iterator[Result]:
    """Of the weights in the package, by `vizattn eval`."""
    from vizattn.engine import as_published, evaluate

    cfg: Any = get_pretrained_cfg(name)
    for recipe_name, recipe in recipes_of(name, cfg.tag).items():
        for split in ("val", "test"):
            metrics = evaluate(as_published(recipe, split=split), split=split, device="cpu")
            command = f"vizattn eval {recipe_name} --pretrained --split {split}"
            value = round(100 * metrics["accuracy"], 3)
            yield measured(f"{name}.{cfg.tag}", f"{cfg.tag} accuracy {split}", value, "%", command)


def recipes_of(name: str, data: str) -> dict[str, dict[str, Any]]:
    """The recipes that train the backbone `name` on `data` from nothing, by their names."""
    from vizattn.engine import load_recipe
    from vizattn.engine.recipes import list_recipes

    recipes = {recipe: load_recipe(recipe) for recipe in list_recipes()}
    wanted = {"name": name, "pretrained": False}
    return {
        key: recipe for key, recipe in recipes.items() if (recipe["model"], recipe["data"]["name"]) == (wanted, data)
    }


def speed(name: str, options: argparse.Namespace) -> Iterator[Result]:
    """Median over rounds of resnet50's time over that of `name`, both at the native size of `name`."""
    variant = "+".join([*["fuse"] * options.fuse, *["channels_last"] * options.channels_last]) or "eager"
    wanted = Options(modes=("forward",), batches=(options.batch,), variants=(variant,), models=(name,))
    cases = cases_of("backbones", wanted, [f"{name}: {name}"])
    [rows] = measure(cases, rounds=options.rounds, threads=options.threads, memory=False)
    ratio = next(row for row in rows if row.name == name).ratio
    if ratio is None:
        raise VizattnError(f"{name} was not measured: {'; '.join(row.note for row in rows if row.note)}.")
    command = (
        f"python tools/measure_zoo.py speed {name} --batch {options.batch} --rounds {options.rounds} "
        f"--threads {options.threads}{' --fuse' * options.fuse}{' --channels-last' * options.channels_last}"
    )
    yield measured(name, FIRST["speed"], round(1 / ratio, 4), "x", command)


def run(folder: Path) -> Iterator[Result]:
    """The test result of a finished run, as the recipe that gives it again.

    Raises:
        VizattnError: No results there, or no packaged recipe with this configuration.
    """
    from vizattn.engine import load_recipe
    from vizattn.engine.config import resolve_config
    from vizattn.engine.kinds import kind_of
    from vizattn.engine.recipes import list_recipes

    if not (folder / "results.json").is_file():
        raise VizattnError(f"There is no finished run in {folder}: results.json is missing.")
    results = json.loads((folder / "results.json").read_text())
    config = results["config"]
    recipe = next((name for name in list_recipes() if resolve_config(load_recipe(name)) == config), None)
    if recipe is None:
        raise VizattnError(f"No packaged recipe has the configuration of {folder}.")
    name, kind = config["model"]["name"], kind_of(config)
    adapters = config["adapter"] if isinstance(config["adapter"], list) else [config["adapter"]]
    how = [adapter["method"] for adapter in adapters if adapter] or ["all of it trained"]
    how = [config["head"]["name"], *how] if "head" in config else how
    tag = f".{get_pretrained_cfg(name).tag}" if config["model"]["pretrained"] else ""  # type: ignore[union-attr]
    metric = f"{config['data']['name']} {kind.title} test ({', '.join(how)})"
    value = round(100 * results["metrics"]["test"][kind.best], 3)
    yield measured(f"{name}{tag}", metric, value, "%", f"vizattn train {recipe}")


def main() -> None:
    """Measure, and write after each backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=[*FIRST, "run"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    for option, default in (("batch", 2), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"speed: default {default}")
    parser.add_argument("--fuse", action="store_true", help="speed: fuse convolutions with their norms first")
    parser.add_argument("--channels-last", action="store_true", help="speed: images channels last in memory")
    options = parser.parse_intermixed_args()
    if options.mode == "run":
        for folder in options.names:
            report(list(run(Path(folder))))
        return
    known = our_names()
    for name in options.names:
        if name not in known:
            raise unknown("backbone", name, known, "vizattn list")
    done = {name.partition(".")[0] for name, metric in newest(read_results()) if metric == FIRST[options.mode]}
    names = options.names or [name for name in known if name not in done]
    if options.mode == "accuracy":
        names = [name for name in names if weights_source(get_pretrained_cfg(name)) == "packaged"]
    for name in names:
        report(list({"cost": cost, "accuracy": accuracy, "speed": speed}[options.mode](name, options)))


def report(rows: list[Result]) -> None:
    """Write the rows, and print them."""
    append_results(rows)
    for row in rows:
        print(f"{row.name:40s} {row.metric:30s} {row.value:16,.4f} {row.unit}", flush=True)


if __name__ == "__main__":
    main()
