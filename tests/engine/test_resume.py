"""A run that was killed and resumed ends in exactly the weights of the run that was not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vizattn import VizattnError
from vizattn.engine import train
from vizattn.engine.checkpoint import checkpoints_in, load_newest, read_checkpoint

EVERYTHING = {
    "model": {"drop_path_rate": 0.2, "drop_rate": 0.1},
    "data": {"augment": "standard"},
    "optimizer": {"accumulate": 2, "clip_grad": 1.0, "layer_decay": 0.8},
    "loss": {"label_smoothing": 0.1, "mixup": 0.3, "cutmix": 0.5},
    "ema": {"decay": 0.9},
}
VPT = {"adapter": {"method": "vpt", "num_tokens": 2}, "data": {"augment": "light", "num_workers": 1}}
PROBE = {"adapter": {"method": "efficient_probing", "num_queries": 2}, "checkpoint": {"keep": 1}}


class Recorder:
    def __init__(self, seen: list[tuple[int, int, dict[str, float]]]) -> None:
        self.seen = seen

    def __call__(self, done: int, total: int, values: dict[str, float]) -> None:
        self.seen.append((done, total, values))


def merged(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, **{key: {**recipe.get(key, {}), **value} for key, value in changes.items()}}


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = work_dir.glob("*/*model.safetensors")
    return load_file(path)


def test_killed_and_resumed_is_the_uninterrupted_run(
    recipe: dict[str, Any], adapter_recipe: dict[str, Any], tmp_path: Path
) -> None:
    every_three = {"checkpoint": {"interval_iters": 3}}
    runs: list[dict[str, Any]] = [
        # In an epoch with a checkpoint every 3 iterations, before any checkpoint, and while one is written.
        {"name": "everything", "config": merged(recipe, EVERYTHING | every_three), "iteration": 14},
        {"name": "early", "config": merged(recipe, EVERYTHING), "iteration": 3},
        {"name": "writing", "config": merged(adapter_recipe, VPT), "checkpoint": 2},
        {"name": "cached", "config": merged(adapter_recipe, PROBE), "checkpoint": 3},
    ]
    for run in runs:
        run["work_dir"] = str(tmp_path / run["name"])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("killed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path / "runs.json"], check=True, env=environment)

    for run, expected_start in zip(runs, (12, 0, 5, 10)):
        work_dir, config = Path(run["work_dir"]), run["config"]
        kept = checkpoints_in(work_dir / "checkpoints")
        assert (int(kept[-1].stem.split("_")[1]) if kept else 0) == expected_start
        assert not (work_dir / "results.json").exists()
        seen: list[tuple[int, int, dict[str, float]]] = []
        resumed = train(config, work_dir=work_dir, resume=True, quiet=True, progress=Recorder(seen))
        whole = train(config, work_dir=tmp_path / "whole" / run["name"], quiet=True)
        assert [done for done, _, _ in seen] == list(range(expected_start + 1, 21))
        ours, theirs = weights(work_dir), weights(Path(whole.work_dir))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert resumed.metrics == whole.metrics
        assert resumed.best == whole.best
        lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines if "val" in line] == [5, 10, 15, 20]
        assert [line["iteration"] for line in lines if "loss" in line] == list(range(2, 21, 2))
        assert not list(work_dir.rglob(".*.tmp"))


def test_a_finished_run_resumes_to_itself(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = train(recipe, work_dir=tmp_path, quiet=True)
    before = weights(tmp_path)
    again = train(recipe, work_dir=tmp_path, quiet=True, resume=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path).items())
    assert again.metrics == first.metrics


def test_checkpoints_hold_only_data_and_little_beside_an_adapter(
    adapter_recipe: dict[str, Any], tmp_path: Path
) -> None:
    config = merged(adapter_recipe, {"adapter": {"method": "vpt", "num_tokens": 2}, "checkpoint": {"keep": 2}})
    train(config, work_dir=tmp_path, quiet=True)
    kept = checkpoints_in(tmp_path / "checkpoints")
    assert [path.stem for path in kept] == ["iter_00000015", "iter_00000020"]
    state = torch.load(kept[-1], weights_only=True)
    assert state["class_names"] == ["left", "middle", "right"]
    assert state["preprocessing"]["input_size"] == [3, 32, 32]
    assert all("adapters." in name or "head." in name for name in state["model"])
    best = read_checkpoint(tmp_path / "checkpoints" / "best.pth")
    assert best["best"]["accuracy"] == state["best"]["accuracy"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe, work_dir=tmp_path, quiet=True)
    expected = weights(tmp_path)
    newest = checkpoints_in(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    state = load_newest(tmp_path / "checkpoints", logging.getLogger("test"))
    assert state is not None and state["iteration"] == 15
    train(recipe, work_dir=tmp_path, quiet=True, resume=True)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path).items())


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"format_version": 1, "model": Evil()}, tmp_path / "iter_00000001.pth")
    with pytest.raises(VizattnError, match=r"Cannot read the checkpoint"):
        load_newest(tmp_path, logging.getLogger("test"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"lr": 0.5}}, r"optimizer.lr: 0.001 in the checkpoint, 0.5 now"),
        ({"model": {"depth": 1}}, r"model.depth: 2 in the checkpoint, 1 now"),
        ({"adapter": {"method": "full"}}, r"adapter.method: None in the checkpoint, 'full' now"),
    ],
)
def test_a_checkpoint_of_another_run_is_named(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    short = merged(recipe, {"schedule": {"epochs": 1, "warmup_epochs": 0}})
    train(short, work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=message):
        train(merged(short, changes), work_dir=tmp_path, quiet=True, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rename", r"class 0 was 'left' and is 'middle'"),
        ("add", r"number of training images was 30 and is 31"),
        ("val", r"identity of val was \w+ and is \w+"),
        ("class", r"there were 3 classes and are 2"),
    ],
)
def test_other_data_is_not_resumed(recipe: dict[str, Any], tmp_path: Path, change: str, message: str) -> None:
    root = shutil.copytree(recipe["data"]["root"], tmp_path / "data")
    recipe = merged(recipe, {"data": {"root": str(root)}, "schedule": {"epochs": 1, "warmup_epochs": 0}})
    train(recipe, work_dir=tmp_path / "run", quiet=True)
    train(recipe, work_dir=tmp_path / "run", quiet=True, resume=True)
    if change == "rename":
        for split in root.iterdir():
            (split / "left").rename(split / "zebra")
    elif change == "class":
        for split in root.iterdir():
            shutil.rmtree(split / "right")
    else:
        folder = root / ("val" if change == "val" else "train") / "left"
        shutil.copy(folder / "0.png", folder / "new.png")
    with pytest.raises(VizattnError, match=message):
        train(recipe, work_dir=tmp_path / "run", quiet=True, resume=True)


def test_drawn_images_are_the_same_data_in_every_epoch(recipe: dict[str, Any], tmp_path: Path) -> None:
    data = {"name": "glyphs", "length": 52, "batch_size": 26}
    recipe = {**recipe, "data": data, "schedule": {"epochs": 2}}
    first = train(recipe, work_dir=tmp_path, quiet=True)
    assert train(recipe, work_dir=tmp_path, quiet=True, resume=True).metrics == first.metrics


def test_a_run_is_resumed_by_its_own_config(adapter_recipe: dict[str, Any], tmp_path: Path) -> None:
    hst = {"method": "hst", "widths": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}
    recipe = {**adapter_recipe, "adapter": hst, "schedule": {"epochs": 1}}
    first = train(recipe, work_dir=tmp_path, quiet=True)
    again = train(tmp_path / "config.json", work_dir=tmp_path, quiet=True, resume=True)
    assert again.metrics == first.metrics and again.config == first.config


def test_an_empty_checkpoint_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "iter_00000005.pth").touch()
    with pytest.raises(VizattnError, match=r"iter_00000005.pth: the file is empty"):
        train(recipe, work_dir=tmp_path, quiet=True, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "1"}, "is not a checkpoint of vizattn"),
        ({"format_version": 2}, "checkpoint format 2; this version of vizattn reads up to 1"),
        ({"config": None}, "config missing or wrong"),
        ({"class_names": None, "preprocessing": 3}, "class_names, preprocessing missing or wrong"),
    ],
)
def test_a_checkpoint_with_a_wrong_header_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    header = {"format_version": 1, "model": {}, "config": {}, "class_names": [], "preprocessing": {}}
    torch.save(header, tmp_path / "right.pth")
    assert read_checkpoint(tmp_path / "right.pth") == header
    torch.save({**header, **change}, tmp_path / "wrong.pth")
    with pytest.raises(VizattnError, match=message):
        read_checkpoint(tmp_path / "wrong.pth")
