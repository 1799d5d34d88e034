"""Two processes through torchrun, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vizattn.engine import evaluate, train
from vizattn.engine.runner import distributed


def torchrun(*command: str | Path, cwd: Path) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one_with_twice_the_batch(adapter_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Batches of 2 x 3 images are those of one process with 6: the mean gradients are the same but for rounding."""
    recipe = adapter_recipe | {
        "adapter": {"method": "vpt", "num_tokens": 2},
        "optimizer": {"accumulate": 2, "name": "sgd", "lr": 0.1},
    }
    halved = {**recipe, "data": {**recipe["data"], "batch_size": 3}}
    (tmp_path / "recipe.json").write_text(json.dumps(halved))
    out = torchrun("-m", "vizattn", "train", "recipe.json", "--work-dir", "two", cwd=tmp_path)
    assert out.count("test accuracy") == 1 and out.count("epoch 4/4") == 1  # the main process alone prints
    one = train(recipe, work_dir=tmp_path / "one", quiet=True)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for split in ("val", "test"):
        assert two["metrics"][split]["samples"] == one.metrics[split]["samples"]  # odd counts: nothing is seen twice
    ours = load_file(tmp_path / "two" / "bundle" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "one" / "bundle" / "adapter_model.safetensors")
    start = {name: tensor.abs().mean() for name, tensor in theirs.items()}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * float(start[name]) + 1e-7)


def test_the_model_that_two_processes_measure_is_the_one_they_export(
    adapter_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The batch norm of efficient probing sees other images in each process."""
    recipe = adapter_recipe | {"adapter": {"method": "efficient_probing", "num_queries": 2}, "ema": {"decay": 0.5}}
    recipe |= {"optimizer": {"lr": 0.02}, "schedule": {"epochs": 2}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    torchrun("-m", "vizattn", "train", "recipe.json", "--work-dir", "two", cwd=tmp_path)
    told = json.loads((tmp_path / "two" / "results.json").read_text())["metrics"]
    for split in ("val", "test"):
        found = evaluate(tmp_path / "two", split=split)
        for key in ("accuracy", "accuracy_top5", "samples", "accuracy_per_class"):
            assert found[key] == told[split][key]
        assert found["loss"] == pytest.approx(told[split]["loss"], rel=1e-6)


def test_processes_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process may compute the features of a whole data set in the meantime."""
    given: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with distributed(torch.device("cpu")):
        assert given["timeout"] >= timedelta(hours=12)


@pytest.mark.slow
def test_two_processes_resume_and_evaluate(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "ema": {"decay": 0.9}}))
    command = ["-m", "vizattn", "train", "recipe.json", "--work-dir"]
    torchrun(*command, "whole", cwd=tmp_path)
    torchrun(*command, "part", cwd=tmp_path)
    (tmp_path / "part" / "model" / "model.safetensors").unlink()
    max((tmp_path / "part" / "checkpoints").glob("iter_*.pth")).unlink()
    torchrun(*command, "part", "--resume", cwd=tmp_path)
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    part = load_file(tmp_path / "part" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    out = torchrun("-m", "vizattn", "eval", "whole", "--json", cwd=tmp_path)
    assert json.loads(out)["accuracy"] == evaluate(tmp_path / "whole")["accuracy"]
