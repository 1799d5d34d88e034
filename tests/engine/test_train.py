"""Whole runs: what they write, what they give back, and that nothing adds up over many of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

import vizattn
from vizattn.cli import main
from vizattn.engine import evaluate, load_trained, train
from vizattn.engine.checkpoint import model_state, read_checkpoint
from vizattn.engine.ema import EmaHook
from vizattn.engine.loggers import wandb_mode


def test_a_run_writes_its_results_and_a_model_that_evaluates_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    seen = []
    recipe |= {"schedule": {"epochs": 8, "warmup_epochs": 1}, "optimizer": {"lr": 0.01}}
    result = train(recipe, work_dir=tmp_path, quiet=True, progress=lambda *event: seen.append(event))
    assert [event[:2] for event in seen] == [(k, 40) for k in range(1, 41)]
    assert seen[-1][2]["loss"] < seen[0][2]["loss"]
    assert result.metrics["test"]["accuracy"] > 0.6
    assert result.metrics["test"]["samples"] == 15 and result.metrics["val"]["samples"] == 12

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["metrics"] == result.metrics
    assert saved["params"]["with_head"] == saved["params"]["total"] == sum(p.numel() for p in result.model.parameters())
    assert saved["class_names"] == ["left", "middle", "right"]
    assert saved["seed"] == 0 and saved["versions"]["torch"] == torch.__version__
    assert saved["config"] == json.loads((tmp_path / "config.json").read_text())
    assert saved["peak_memory_mb"] > 10 and saved["seconds"] > 0
    assert evaluate(tmp_path) == result.metrics["test"]
    assert evaluate(tmp_path / "model", split="val") == result.metrics["val"]
    assert "Epoch(train)" in (tmp_path / "train.log").read_text()
    trained = load_trained(tmp_path)
    assert trained.class_names == result.class_names and not trained.model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "results.json",
        "train.log",
    ]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"data": {**recipe["data"], "augment": "light"}, "model": {**recipe["model"], "drop_path_rate": 0.2}}
    runs = [
        train(recipe, work_dir=tmp_path / str(i), quiet=True, overrides=overrides).model.state_dict()
        for i, overrides in enumerate(({}, {"data.num_workers": 2}, {"seed": 1}))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["head.weight"], runs[2]["head.weight"])


def test_pretrained_weights_are_what_training_starts_from(
    adapter_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mmengine initialises the weights of a model that has `init_weights`, which timm's models do.
    created = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: created.append(create(*a, **k)) or created[-1])
    recipe = adapter_recipe | {"adapter": {"method": "vpt", "num_tokens": 2}, "schedule": {"epochs": 1}}
    seen: list[torch.Tensor] = []
    result = train(
        recipe,
        work_dir=tmp_path,
        quiet=True,
        progress=lambda *_: seen.append(created[0].blocks[0].mlp.fc1.weight.clone()),
    )
    torch.manual_seed(0)
    assert all(torch.equal(seen[0], weight) for weight in seen)
    bundle = json.loads((tmp_path / "bundle" / "adapter_config.json").read_text())
    assert bundle["class_names"] == ["left", "middle", "right"]
    assert bundle["preprocessing"] == result.preprocessing
    assert bundle["metadata"]["accuracy"]["test"] == result.metrics["test"]["accuracy"]
    assert result.params["without_head"] == 6 * 2 * 96


@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"deterministic": True}, {"ema": {"decay": 0.5}}])
def test_options_that_change_the_arithmetic_still_train(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe |= {"schedule": {"epochs": 8}, "optimizer": {"lr": 0.01}} | changes
    result = train(recipe, work_dir=tmp_path, quiet=True)
    assert result.metrics["test"]["accuracy"] > 0.6
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert not torch.are_deterministic_algorithms_enabled()
    assert evaluate(tmp_path)["accuracy"] == result.metrics["test"]["accuracy"]


def test_the_average_has_running_statistics_of_its_own(adapter_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = adapter_recipe | {"adapter": {"method": "efficient_probing", "num_queries": 2}, "schedule": {"epochs": 1}}
    plain = train(recipe, work_dir=tmp_path / "plain", quiet=True).model.state_dict()
    averaged = train(recipe | {"ema": {"decay": 0.5}}, work_dir=tmp_path / "averaged", quiet=True).model.state_dict()
    newest = read_checkpoint(tmp_path / "averaged" / "checkpoints" / "iter_00000005.pth")
    (name,) = (name for name in averaged if name.endswith("running_mean"))
    assert torch.equal(newest["model"][name], plain[name])
    assert torch.equal(newest["ema"][name], averaged[name]) and not torch.equal(averaged[name], plain[name])


@pytest.mark.parametrize("method", ["apla", "linear_probe", "full"])
def test_the_average_holds_what_checkpoints_hold(method: str) -> None:
    """Not the statistics of frozen norms, which a checkpoint of an adapter could not place."""
    model = vizattn.attach(timm.create_model("efficientvit_va_nano", num_classes=3), method)
    names = EmaHook(model, 0.9).state_dict().keys()
    assert names <= model_state(model).keys() and len(names) >= 2


def test_a_run_without_validation_and_test(recipe: dict[str, Any], tmp_path: Path) -> None:
    data = {**recipe["data"], "root": str(Path(recipe["data"]["root"]) / "train"), "val_fraction": 0}
    result = train({**recipe, "data": {**data, "test_fraction": 0}}, work_dir=tmp_path, quiet=True)
    assert result.metrics == {} and result.best == {}
    assert evaluate(tmp_path, split="train")["samples"] == 30


def test_many_runs_in_one_process_do_not_add_up(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"schedule": {"epochs": 1}}
    managers = (MMLogger, MessageHub, Visualizer, DefaultScope)
    train(recipe, work_dir=tmp_path / "0", quiet=True)
    before = [set(kind._instance_dict) for kind in managers]
    for run in range(3):
        train(recipe, work_dir=tmp_path / str(run), quiet=True)
    assert [set(kind._instance_dict) for kind in managers] == before
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert opened and not [path for path in opened if path.startswith(str(tmp_path))]


def test_a_fresh_run_sets_earlier_checkpoints_aside(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"schedule": {"epochs": 2}}
    train(recipe, work_dir=tmp_path, quiet=True)
    train({**recipe, "schedule": {"epochs": 1}}, work_dir=tmp_path, quiet=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.pth", "iter_00000005.pth"]
    assert (tmp_path / "checkpoints.previous" / "iter_00000010.pth").exists()


def test_wandb_and_tensorboard_never_stop_a_run(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "offline"
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    recipe |= {"schedule": {"epochs": 1}, "logging": {"interval": 2, "wandb": True, "tensorboard": tensorboard}}
    result = train(recipe, work_dir=tmp_path / "run", quiet=True)
    assert result.metrics["val"]["samples"] == 12
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert not tensorboard or list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_commands(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "pretrained=False, patch_size=8, embed_dim=32, depth=2, num_heads=2"
    text = f'"""Tiny."""\nmodel = dict(name="vit_va_nano_patch4_32", {options})\ndata = dict(batch_size=6)\n'
    Path("tiny.py").write_text(text)
    command = ["train", "tiny.py", "--data", str(image_folder), "--epochs", "2", "--seed", "3", "--amp", "bf16"]
    assert main([*command, "--cfg-options", "optimizer.lr=0.01", "ema.decay=0.9"]) == 0
    out = capsys.readouterr().out
    assert "epoch 2/2" in out and "test accuracy" in out and "work_dirs/tiny/results.json" in out
    saved = json.loads(Path("work_dirs/tiny/results.json").read_text())
    assert saved["seed"] == 3 and saved["config"]["amp"] == "bf16"
    assert saved["config"]["optimizer"]["lr"] == 0.01 and saved["config"]["ema"] == {"decay": 0.9}

    for target in (["work_dirs/tiny"], ["tiny.py"], ["work_dirs/tiny/model"]):
        assert main(["eval", *target, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["accuracy"] == saved["metrics"]["test"]["accuracy"] and printed["split"] == "test"
    assert main(["eval", "work_dirs/tiny", "--split", "val"]) == 0
    assert "top-1" in capsys.readouterr().out
    measured = {}
    shutil.copytree(image_folder / "test", "only/test")
    for data in ("only", str(image_folder / "val"), str(image_folder)):
        assert main(["eval", "work_dirs/tiny", "--data", data, "--json"]) == 0
        measured[data] = json.loads(capsys.readouterr().out)
    assert [(m["split"], m["samples"]) for m in measured.values()] == [("test", 15), ("all", 12), ("test", 15)]
    assert measured["only"]["accuracy"] == saved["metrics"]["test"]["accuracy"]
    assert main(["eval", "work_dirs/tiny", "--data", "only", "--split", "val"]) == 2
    assert "There is no val split" in capsys.readouterr().err
    assert main(["train", "tiny.py", "--data", "only", "--work-dir", "other"]) == 2
    assert "There is no train split" in capsys.readouterr().err
    assert main(["train", "tiny.py", "--cfg-options", "optimizer.lrr=1"]) == 2
    assert "Did you mean 'optimizer.lr'" in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "--bundle DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_training_is_nearly_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"schedule": {"epochs": 2}}
    plain = train(recipe, work_dir=tmp_path / "plain", quiet=True)
    compiled = train({**recipe, "compile": True}, work_dir=tmp_path / "compiled", quiet=True)
    assert compiled.metrics["val"]["loss"] == pytest.approx(plain.metrics["val"]["loss"], rel=1e-3)
    assert evaluate(tmp_path / "compiled")["loss"] == pytest.approx(plain.metrics["test"]["loss"], rel=1e-3)
