"""Recipes and options: what is filled in, what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vizattn import VizattnError
from vizattn.data import DATASETS
from vizattn.engine.config import apply_overrides, dump_config, parse_overrides, resolve_config
from vizattn.engine.options import DATA_OPTIONS, TASKS, options_of
from vizattn.engine.recipes import find_recipe, list_recipes, load_recipe

MINIMAL = {"model": {"name": "vit_va_nano_patch4_32"}}


def test_defaults_are_filled_in() -> None:
    config = resolve_config(MINIMAL)
    assert config["optimizer"]["name"] == "adamw"
    assert config["ema"] is None and config["adapter"] is None
    assert resolve_config({**MINIMAL, "ema": {}})["ema"] == {"decay": 0.999}
    assert resolve_config(config) == config
    for name in options_of("classification"):
        section, _, key = name.partition(".")
        assert section in config and (not key or section == "ema" or key in config[section])


def test_a_resolved_config_is_plain_json(tmp_path: Path) -> None:
    config = resolve_config({"model": {"name": "x", "depth": 3}, "adapter": {"method": "vpt", "num_tokens": 4}})
    dump_config(config, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == load_recipe(tmp_path / "config.json")


def test_tuples_are_lists_at_any_depth() -> None:
    given = {**MINIMAL, "adapter": {"method": "hst", "widths": (8, 8)}, "data": {"val_fraction": 0}}
    config = resolve_config(given)
    assert config["adapter"]["widths"] == [8, 8] and config["data"]["val_fraction"] == 0.0
    assert config == resolve_config(json.loads(json.dumps(config)))


def test_every_option_of_a_data_set_has_its_type() -> None:
    assert set(DATA_OPTIONS) == {option for options in DATASETS.values() for option in options}
    assert not any(f"data.{name}" in options_of(task) for name in DATA_OPTIONS for task in TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, "Unknown option 'optimiser'. Did you mean 'optimizer'"),
        ({"optimizer": {"learning_rate": 1.0}}, r"Unknown option 'optimizer.learning_rate'.*optimizer.lr"),
        ({"data": {"batchsize": 3}}, r"Unknown option 'data.batchsize'. Did you mean 'data.batch_size'"),
        ({"data": {"name": "digit"}}, r"data.name must be one of 'digits', .*'transfer', not 'digit'"),
        ({"data": {"augment": "heavy"}}, r"data.augment must be one of 'none', 'light', 'standard', not 'heavy'"),
        ({"schedule": {"name": "cosin"}}, r"schedule.name must be one of 'cosine', 'poly', 'constant', not 'cosin'"),
        ({"schedule": {"epochs": 2.5}}, "schedule.epochs must be int, not 2.5"),
        ({"schedule": {"epochs": 0}}, "schedule.epochs must be at least 1, not 0"),
        ({"schedule": {"epochs": 3, "warmup_epochs": 3}}, "the warm-up must be shorter"),
        ({"optimizer": {"name": "adamww"}}, "Unknown optimizer.name 'adamww'. Did you mean 'adamw'"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr must be above 0, not 0.0"),
        ({"optimizer": {"lr": "1e-3x"}}, "optimizer.lr must be float, not '1e-3x'"),
        ({"optimizer": {"accumulate": True}}, "optimizer.accumulate must be int, not True"),
        ({"loss": {"label_smoothing": 1.5}}, "loss.label_smoothing must be at most 0.99"),
        ({"amp": "fp16"}, "amp must be one of None, 'bf16', not 'fp16'"),
        ({"cache_features": True}, "cache_features must be one of 'auto', False, not True"),
        ({"model": {"pretrained": True}}, "needs model.name"),
        ({"adapter": {"num_tokens": 3}}, "adapter must name a method"),
        ({"data": "digits"}, "data must be a dict of options, not 'digits'"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"model": {"name": "x", "act": print}}, "model.act must be made of numbers"),
        ({"adapter": [{"method": "vpt", "widths": {1, 2}}]}, "adapter.0.widths must be made of numbers"),
        ({"model": {"name": "x", "args": {1: 2}}}, "model.args must be made of numbers"),
    ],
)
def test_a_wrong_option_is_told_with_its_choices(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        resolve_config({**MINIMAL, **changes})


def test_overrides_are_literals_or_words() -> None:
    given = parse_overrides(["lr=1e-3", "c=[1, 2]", "amp=bf16", "ema=none", "wandb=true", "root=/a=b", "x='3'"])
    assert given == {"lr": 1e-3, "c": [1, 2], "amp": "bf16", "ema": None, "wandb": True, "root": "/a=b", "x": "3"}
    with pytest.raises(VizattnError, match=r"takes NAME=VALUE"):
        parse_overrides(["optimizer.lr"])


def test_overrides_reach_sections_lists_and_what_was_none() -> None:
    config = {"adapter": [{"method": "vpt"}, {"method": "efficient_probing"}], "ema": None, "amp": None}
    changed = apply_overrides(config, {"adapter.0.num_tokens": 3, "ema.decay": 0.9, "optimizer.lr": 1.0})
    assert changed["adapter"][0] == {"method": "vpt", "num_tokens": 3}
    assert changed["ema"] == {"decay": 0.9} and changed["optimizer"] == {"lr": 1.0}
    assert config["ema"] is None and "num_tokens" not in config["adapter"][0]
    with pytest.raises(VizattnError, match=r"'5' is not a place in a list of 2"):
        apply_overrides(config, {"adapter.5.num_tokens": 3})
    with pytest.raises(VizattnError, match=r"Cannot set seed.x: seed is 3, not a section"):
        apply_overrides({"seed": 3}, {"seed.x": 1})


def test_recipes_are_found_by_path_name_and_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classification").mkdir()
    text = '"""A recipe."""\nepochs = 3\nmodel = dict(name="x")\nschedule = dict(epochs=3)\n'
    (tmp_path / "classification" / "digits_vpt.py").write_text(text)
    (tmp_path / "classification" / "__init__.py").write_text("")
    monkeypatch.setattr("vizattn.engine.recipes._packaged", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)  # away from the repository, where configs/ is a folder
    assert list_recipes() == ["classification/digits_vpt"]
    path = tmp_path / "classification" / "digits_vpt.py"
    for name in ("classification/digits_vpt", "digits_vpt", "configs/classification/digits_vpt.py", path):
        assert find_recipe(name) == path
    assert load_recipe("digits_vpt")["model"] == {"name": "x"}
    with pytest.raises(VizattnError, match=r"Unknown recipe 'digits_vtp'. Did you mean 'classification/digits_vpt'"):
        find_recipe("digits_vtp")
    path.write_text("model = dict(\n")
    with pytest.raises(VizattnError, match=r"Cannot read the recipe .*digits_vpt.py"):
        load_recipe("digits_vpt")


def test_every_packaged_recipe_is_valid() -> None:
    for name in list_recipes():
        task = resolve_config(load_recipe(name))["task"]
        assert task == ("classification" if name.startswith("vtab/") else name.partition("/")[0])
