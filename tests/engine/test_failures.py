"""What goes wrong gives one clear message and leaves nothing half-written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from vizattn import VizattnError
from vizattn.cli.train import run as run_train
from vizattn.engine import checkpoint, evaluate, train
from vizattn.engine.checkpoint import checkpoints_in, load_model_state, read_checkpoint, save_checkpoint
from vizattn.engine.hooks import last_good
from vizattn.engine.optim import EpochOptimWrapper
from vizattn.engine.task import ClassificationTask
from vizattn.files import replacing


def test_a_nan_loss_stops_and_names_the_iteration(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = ClassificationTask.forward

    def spoilt(self: ClassificationTask, inputs: Any, labels: Any = None, mode: str = "tensor") -> Any:
        result = forward(self, inputs, labels, mode)
        if mode == "loss":
            calls.append(1)
            if len(calls) == 8:
                return {"loss": result["loss"] * float("nan")}
        return result

    monkeypatch.setattr(ClassificationTask, "forward", spoilt)
    with pytest.raises(VizattnError, match=r"loss became nan at iteration 8 of 20 \(epoch 2\).*iter_00000005.pth"):
        train(recipe, work_dir=tmp_path, quiet=True)
    kept = checkpoints_in(tmp_path / "checkpoints")
    assert [path.stem for path in kept] == ["iter_00000005"]
    assert f"vizattn eval {kept[0]}" in last_good(tmp_path / "checkpoints")
    assert evaluate(kept[0])["samples"] == 15
    assert all(torch.isfinite(tensor).all() for tensor in read_checkpoint(kept[0])["model"].values())


def test_weights_that_are_not_finite_are_never_saved(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = EpochOptimWrapper.step

    def overflowing(self: EpochOptimWrapper, **options: Any) -> None:
        step(self, **options)
        steps.append(1)
        if len(steps) == 10:  # the last of the second epoch, after a loss that was still finite
            self.optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(EpochOptimWrapper, "step", overflowing)
    with pytest.raises(VizattnError, match=r"no longer finite after iteration 10 \(epoch 2\).*iter_00000005.pth"):
        train(recipe, work_dir=tmp_path, quiet=True)
    assert [path.stem for path in checkpoints_in(tmp_path / "checkpoints")] == ["iter_00000005"]


def test_a_work_dir_that_cannot_be_made(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VizattnError, match=r"Cannot write .*file.*--work-dir"):
        train(recipe, work_dir=tmp_path / "file" / "run", quiet=True)
    with pytest.raises(VizattnError, match=r"Cannot write .*file"):
        train(recipe, work_dir=tmp_path / "file", quiet=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_keeps_the_whole_checkpoints(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save, saved = torch.save, []

    def full(state: Any, file: BinaryIO) -> None:
        saved.append(file)
        if len(saved) > 3:
            file.write(b"half")
            raise OSError(code, os.strerror(code), file.name)
        save(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(VizattnError, match=os.strerror(code)):
        train(recipe, work_dir=tmp_path, quiet=True)
    monkeypatch.undo()
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert files and all(file.suffix == ".pth" for file in files)
    assert all(read_checkpoint(file)["format_version"] == 1 for file in files)


@pytest.mark.parametrize("numbers", [1, 2_000, 100_000])
def test_a_checkpoint_on_a_full_device_is_an_os_error(tmp_path: Path, numbers: int) -> None:
    path = tmp_path / "iter_00000001.pth"
    path.write_text("before")
    temporary = tmp_path / f".{path.name}.{os.getpid()}.tmp"
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left"):
        save_checkpoint(path, {"x": torch.zeros(numbers)})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written(
    adapter_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path / "file"))
    recipe = adapter_recipe | {"adapter": {"method": "linear_probe"}}
    with pytest.raises(VizattnError, match=r"Cannot write .*VIZATTN_HOME .*cache_features=False"):
        train(recipe, work_dir=tmp_path / "run", quiet=True)


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = {**model.state_dict(), "2.weight": torch.zeros(1), "0.bias": torch.zeros(4)}
    del state["1.weight"]
    words = r"1.weight is missing; 2.weight is not in the model; 0.bias has shape \(4,\), the model's is \(3,\)"
    with pytest.raises(VizattnError, match=words):
        load_model_state(model, state, tmp_path)


def test_other_frozen_weights_cannot_be_resumed(
    adapter_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapter_recipe | {"adapter": {"method": "vpt"}, "schedule": {"epochs": 1}}
    train(recipe, work_dir=tmp_path, quiet=True)
    monkeypatch.setattr("vizattn.adapters.fingerprint", lambda model: "another")
    with pytest.raises(VizattnError, match=r"trained on other frozen weights of vit_va_nano_patch4_32"):
        train(recipe, work_dir=tmp_path, quiet=True, resume=True)


def test_a_mistake_leaves_no_empty_folder(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for folder in (tmp_path / "new", tmp_path / "made"):
        with pytest.raises(VizattnError, match="There is no folder"):
            train(recipe, work_dir=folder, overrides={"data.name": "folder", "data.root": "nowhere"}, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_mistake_leaves_an_earlier_run_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe | {"schedule": {"epochs": 1}}, work_dir=tmp_path, quiet=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(VizattnError, match=r"Unknown adapter"):
        train({**recipe, "adapter": {"method": "vtp"}}, work_dir=tmp_path, quiet=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_wrong_class_counts(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = recipe["model"]
    with pytest.raises(VizattnError, match=r"Unknown model 'vit_va_nano_patch4_31'.*'vit_va_nano_patch4_32'"):
        train({**recipe, "model": {"name": "vit_va_nano_patch4_31"}}, work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=r"Cannot create the model .*dept"):
        train({**recipe, "model": {**model, "dept": 3}}, work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=r"model.num_classes=10, but the data has 3 classes"):
        train({**recipe, "model": {**model, "num_classes": 10}}, work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=r"Unknown adapter 'vtp'. Did you mean 'vpt'"):
        train({**recipe, "adapter": {"method": "vtp"}}, work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=r"Unknown recipe 'nothing_like_it'"):
        train("nothing_like_it", work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=r"device"):
        train(recipe, work_dir=tmp_path, quiet=True, device="cdua")


def test_evaluating_on_other_classes(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["schedule"] = {"epochs": 1}
    train(recipe, work_dir=tmp_path, quiet=True)
    with pytest.raises(VizattnError, match=r"The data has 10 classes, but the head of the trained model has 3"):
        evaluate(tmp_path, overrides={"data.name": "digits"})
    with pytest.raises(VizattnError, match=r"Unknown split 'tset'. Did you mean 'test'"):
        evaluate(tmp_path, split="tset")
    with pytest.raises(VizattnError, match=r"no trained model in .*checkpoints: expected adapter_config.json"):
        evaluate(tmp_path / "checkpoints")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(VizattnError, match=r"Cannot load the model"):
        evaluate(tmp_path)


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import argparse

    from vizattn.cli.train import add_arguments

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    monkeypatch.setattr("vizattn.engine.train", interrupted)
    monkeypatch.setattr("sys.argv", ["vizattn", "train", "x.py", "--work-dir", str(tmp_path)])
    assert run_train(parser.parse_args(["x.py", "--work-dir", str(tmp_path)])) == 130
    assert f"Go on with: vizattn train x.py --work-dir {tmp_path} --resume" in capsys.readouterr().err
