"""Bits that flip on a disk are noticed, and lines that are damaged are left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vizattn import VizattnError
from vizattn.engine import train
from vizattn.engine.checkpoint import load_newest, read_checkpoint, save_checkpoint
from vizattn.engine.evaluate import export_whole, load_trained
from vizattn.engine.hooks import JsonLinesHook
from vizattn.engine.run_report import training_section
from vizattn.engine.runner import distributed


def flip(path: Path, inside: bytes) -> None:
    """One bit in the middle of `inside`, which is in the file once."""
    data = path.read_bytes()
    assert data.count(inside) == 1
    place = data.index(inside) + len(inside) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_a_flipped_bit_in_a_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    weight = torch.arange(300.0)
    for iteration in (1, 2):
        state = dict.fromkeys(
            ("data", "optimizer", "schedulers", "ema", "epoch", "best", "fingerprint", "world_size"), 0
        )
        state |= {"format_version": 1, "config": {}, "class_names": [], "preprocessing": {}, "iteration": iteration}
        save_checkpoint(tmp_path / f"iter_{iteration:08d}.pth", {**state, "model": {"weight": weight}})
    newest = tmp_path / "iter_00000002.pth"
    flip(newest, weight.numpy().tobytes())
    with pytest.raises(VizattnError, match=r"Cannot read the checkpoint .*iter_00000002.pth: .*not what was written"):
        read_checkpoint(newest)
    whole = newest.with_name("iter_00000001.pth").read_bytes()
    newest.write_bytes(whole.replace(b"/data/0", b"/dxta/0", 1))  # the name of a part, where torch does not look
    with pytest.raises(VizattnError, match="Cannot read the checkpoint"):
        read_checkpoint(newest)
    found = load_newest(tmp_path, logging.getLogger("test"))
    assert found is not None and found["iteration"] == 1


def test_a_flipped_bit_in_a_model_is_told(recipe: dict[str, Any], tmp_path: Path) -> None:
    import timm

    options = dict(recipe["model"])
    model: Any = timm.create_model(options.pop("name"), num_classes=3, **options)
    export_whole(model, tmp_path, recipe["model"], None, ["a", "b", "c"], {}, None)
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()
    flip(path, model.patch_embed.proj.weight.detach().numpy().tobytes())
    with pytest.raises(VizattnError, match=r"checksum of model.safetensors is not the one in model.json"):
        load_trained(tmp_path)
    path.write_bytes(before)
    assert load_trained(tmp_path).class_names == ["a", "b", "c"]
    note = json.loads((tmp_path / "model.json").read_text())
    del note["weights_sha256"]  # as of older versions
    (tmp_path / "model.json").write_text(json.dumps(note))
    assert load_trained(tmp_path).class_names == ["a", "b", "c"]
    for change in ({"palette": 0}, {"segmenter": [None]}, {"model": 3}):
        (tmp_path / "model.json").write_text(json.dumps(note | change))
        with pytest.raises(VizattnError):
            load_trained(tmp_path)


def test_a_model_that_does_not_fit_on_the_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_whole(torch.nn.Linear(1, 1), tmp_path, {"name": "x"}, None, ["a"], {}, None)
    assert list(tmp_path.iterdir()) == []


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = {"iteration": 1, "loss": 0.5, "lr": 0.1}, {"iteration": 2, "val": {"accuracy": 0.5}}
    odd = b'\xff\xfe\n3\n{"iteration": "2", "loss": 1, "lr": 1}\n'
    odd += b'{"iteration": 2, "loss": 1}\n{"iteration": 2, "val": {}}\n'
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in whole) + odd + b'{"iteration": 9}\n{"iter')
    assert "svg" in training_section(SimpleNamespace(work_dir=tmp_path), "accuracy", "accuracy")[1]
    JsonLinesHook(path, 1).before_train(SimpleNamespace(iter=2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [*whole, {"iteration": 2, "loss": 1}, {"iteration": 2, "val": {}}]


def test_the_end_of_a_process_that_loads_images_is_told() -> None:
    words = r"process that loads images ended.*pid 7.*--resume"
    with pytest.raises(VizattnError, match=words), distributed(torch.device("cpu")):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="something else"), distributed(torch.device("cpu")):
        raise RuntimeError("something else about gloo")


def test_a_loader_that_is_killed_ends_the_run_in_one_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    import os
    import signal
    from multiprocessing import active_children

    def kill(done: int, total: int, values: dict[str, float]) -> None:
        if done == 2:
            os.kill(active_children()[0].pid or 0, signal.SIGKILL)

    long = {**recipe, "data": {**recipe["data"], "num_workers": 1, "batch_size": 1}}
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(VizattnError, match="process that loads images ended"):
            train(long, work_dir=tmp_path, quiet=True, progress=kill)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_connection_that_a_loader_loses_is_told_as_its_end(tmp_path: Path) -> None:
    from multiprocessing import Pipe

    here, there = Pipe()
    there.close()
    with pytest.raises(VizattnError, match="process that loads images ended"), distributed(torch.device("cpu")):
        here.recv()
    with pytest.raises(FileNotFoundError), distributed(torch.device("cpu")):
        (tmp_path / "missing").read_bytes()
