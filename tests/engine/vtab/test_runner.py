"""Whole studies on a tiny suite: the protocol, resuming, sharing, failing."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vizattn.engine.vtab.cells as cells
import vizattn.engine.vtab.probes as probes
from vizattn.adapters import create_from_bundle, read_bundle
from vizattn.data import build_transforms
from vizattn.data.transfer import open_split
from vizattn.engine.vtab.plan import Method, Study, cells_of, ready, selected, total
from vizattn.engine.vtab.results import Results
from vizattn.engine.vtab.runner import _ending, _give_up, run_study
from vizattn.errors import VizattnError
from vizattn.files import explain_disk_errors

GRID = [{"optimizer.lr": lr, "optimizer.weight_decay": wd} for lr in (1e-1, 1e-3) for wd in (0.0, 0.1)]
Make = Callable[..., Any]


def _lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "results.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == "cell"]


def _numbers(folder: Path) -> dict[str, float]:
    return {line["cell"]: line["accuracy"] for line in _lines(folder)}


def test_a_study_ends_with_every_cell_once_and_bundles_that_give_its_accuracy(
    tmp_path: Path, method: Make, study: Make, tree: Path
) -> None:
    chosen = study(method("linear_probe", GRID), method("vpt", None, adapter={"method": "vpt", "num_tokens": 2}))
    seen: list[dict[str, Any]] = []
    run_study(chosen, tmp_path, report=seen.extend)
    lines = _lines(tmp_path)
    assert len(lines) == len({line["cell"] for line in lines}) == total(chosen) == 2 * (4 + 2 + 2)
    assert [line["cell"] for line in seen] == [line["cell"] for line in lines]
    assert all(line["status"] == "done" for line in lines)
    assert not (tmp_path / "running").exists()

    for line in lines:
        assert ("bundle" in line) == (line["stage"] == "final")
        if line["stage"] == "final":
            assert _recomputed(tmp_path / line["bundle"], tree, line["task"]) == pytest.approx(line["accuracy"])
    run_study(chosen, tmp_path, report=lambda new: seen.clear())
    assert _lines(tmp_path) == lines, "nothing is done twice"


def _recomputed(bundle: Path, tree: Path, task: str) -> float:
    """Test accuracy of a bundle by a plain loop over the list file."""
    model, config = create_from_bundle(bundle).eval(), read_bundle(bundle)
    preprocessing = config["preprocessing"]
    assert preprocessing["crop_mode"] == "squash" and preprocessing["crop_pct"] == 1.0
    height, width = preprocessing["input_size"][1:]
    right = 0
    entries = [line.split() for line in (tree / task / "test.txt").read_text().splitlines()]
    for name, label in entries:
        image = Image.open(tree / task / name).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image) / 255.0).float().permute(2, 0, 1)
        mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            right += int(model(((pixels - mean) / std)[None]).argmax() == int(label))
    return right / len(entries)


def test_the_transform_squashes_to_the_input_size(method: Make, study: Make, tmp_path: Path) -> None:
    preprocessing = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    preprocessing |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    wanted = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 127.5 - 1
    got = build_transforms(preprocessing, train=False)(image).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_selection_is_by_val_and_the_test_split_is_opened_once_at_the_end(
    tmp_path: Path, method: Make, study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits are opened in this order: those to select on, and only then, once, the test split."""
    order: list[tuple[str, str]] = []

    def opened(suite: Any, task: Any, split: str, **kwargs: Any) -> Any:
        order.append((task.name, split))
        return open_split(suite, task, split, **kwargs)

    monkeypatch.setattr(probes, "open_split", opened)
    chosen = study(method("linear_probe", GRID))
    chosen.tasks.pop()
    run_study(chosen, tmp_path)
    splits = [split for _, split in order]
    assert splits.count("test") == 1 and splits[-1] == "test"
    lines = _lines(tmp_path)
    stages = [line["stage"] for line in lines]
    assert stages == ["select"] * 4 + ["final"] * 2
    best = max(lines[:4], key=lambda line: (line["accuracy"], -line["setting"]["optimizer.lr"]))
    assert all(line["setting"]["optimizer.lr"] == best["setting"]["optimizer.lr"] for line in lines[4:])
    assert [line["samples"] for line in lines] == [12] * 4 + [30] * 2
    assert [line["split"] for line in lines] == ["val"] * 4 + ["test"] * 2


def test_the_engines_own_loop_never_sees_test_while_selecting(
    tmp_path: Path, method: Make, study: Make, tree: Path
) -> None:
    """With the test lists and images gone, the selection of a trained method still runs, and only then it fails."""
    partly = tmp_path / "tree"
    shutil.copytree(tree, partly)
    for task in ("near", "far"):
        shutil.rmtree(partly / task / "images" / "test")
        (partly / task / "test.txt").unlink()
    grid = [{"optimizer.lr": 1e-2}, {"optimizer.lr": 1e-3}]
    for label, adapter in (("vpt", {"method": "vpt", "num_tokens": 2}), ("linear_probe", {"method": "linear_probe"})):
        chosen = study(method(label, grid, adapter=adapter), root=str(partly), seeds=[1])
        run_study(chosen, tmp_path / label)
        found = Counter((line["stage"], line["status"]) for line in _lines(tmp_path / label))
        assert found == {("select", "done"): 4, ("final", "failed"): 2}
        assert all("test" in line["reason"] for line in _lines(tmp_path / label) if line["status"] == "failed")


def test_ties_go_to_the_smaller_learning_rate(tmp_path: Path, method: Make, study: Make) -> None:
    chosen = study(method("linear_probe", [{"optimizer.lr": lr} for lr in (1e-1, 1e-3, 1e-2)]))
    results = Results(tmp_path)
    selection, final = cells_of(chosen, chosen.methods[0], chosen.tasks[0], results)
    assert len(selection) == 3 and final == []
    results.append(
        {"kind": "cell", "cell": cell.key, "status": "done", "accuracy": accuracy}
        for cell, accuracy in zip(selection, (0.5, 0.5, 0.25))
    )
    results.read()
    assert selected(selection, results) == {"optimizer.lr": 1e-3}


def test_the_mean_over_sweep_seeds_decides_and_failed_settings_are_out(
    tmp_path: Path, method: Make, study: Make
) -> None:
    grid = [{"optimizer.lr": lr} for lr in (1.0, 0.1, 0.01)]
    chosen = study(method("linear_probe", grid), sweep_seeds=[1, 2])
    results = Results(tmp_path)
    selection, _ = cells_of(chosen, chosen.methods[0], chosen.tasks[0], results)
    accuracies = iter((0.9, 0.9, 0.7, 0.5, 0.8, 0.3))
    lines = [{"kind": "cell", "cell": c.key, "status": "done", "accuracy": next(accuracies)} for c in selection]
    lines[0] |= {"status": "failed", "reason": "diverged", "time": 1.0}
    results.append(lines)
    results.read()
    assert selected(selection, results) == {"optimizer.lr": 0.1}


def test_cached_equals_uncached_and_the_backbone_passes_once(
    tmp_path: Path, method: Make, study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    plain = probes.frozen_features_each

    def counted(model: Any, images: torch.Tensor) -> torch.Tensor:
        passed.append(len(images))
        return plain(model, images)

    import vizattn.engine.features as features

    monkeypatch.setattr(features, "frozen_features_each", counted)
    monkeypatch.setattr(probes, "frozen_features_each", counted)
    ep = method("efficient_probing", GRID, adapter={"method": "efficient_probing", "num_queries": 4})
    run_study(study(ep, sweep_seeds=[1, 2]), tmp_path / "cached")
    # Two tasks: 36 different images to train and select on, once; 30 test images, once.
    assert sum(passed) == 2 * (36 + 30)
    passed.clear()
    run_study(study(ep, sweep_seeds=[1, 2], cached=False), tmp_path / "uncached")
    # Two seeds and two epochs of 24 to select, measured on 12; of 36 at the end, measured on 30.
    assert sum(passed) == 2 * (4 * 24 + 12 + 4 * 36 + 30)
    assert _numbers(tmp_path / "cached") == _numbers(tmp_path / "uncached")
    for line in _lines(tmp_path / "cached"):
        if "bundle" in line:
            name = "adapter_model.safetensors"
            one, other = (tmp_path / kind / line["bundle"] / name for kind in ("cached", "uncached"))
            assert one.read_bytes() == other.read_bytes()


def test_a_study_cut_anywhere_goes_on_to_the_same_numbers(tmp_path: Path, method: Make, study: Make) -> None:
    chosen = study(method("linear_probe", GRID), sweep_seeds=[1, 2])
    run_study(chosen, tmp_path / "whole")
    text = (tmp_path / "whole" / "results.jsonl").read_bytes()
    wanted = _numbers(tmp_path / "whole")
    for share in (0.1, 0.35, 0.6, 0.9):
        folder = tmp_path / f"cut{share}"
        folder.mkdir()
        (folder / "results.jsonl").write_bytes(text[: int(share * len(text))])
        run_study(chosen, folder)
        results = Results(folder)
        results.read()
        assert {line["cell"]: line["accuracy"] for line in results.cells()} == wanted


def test_two_runners_share_one_file(tmp_path: Path, method: Make, study: Make) -> None:
    grid = [{"optimizer.lr": 1e-2}, {"optimizer.lr": 1e-3}]
    vpt = method("vpt", grid, adapter={"method": "vpt", "num_tokens": 2})
    chosen = study(method("linear_probe", GRID), vpt)
    failures: list[BaseException] = []

    def go() -> None:
        try:
            for unit in runner_units(chosen, tmp_path):
                assert unit
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    lines = _lines(tmp_path)
    assert len(lines) == len({line["cell"] for line in lines}) == total(chosen)


def runner_units(chosen: Study, folder: Path) -> list[Any]:
    """A runner whose cells are instant."""
    from vizattn.engine.vtab.runner import _units

    results, done = Results(folder), []
    for unit in _units(chosen, results, lambda new: None):
        done.append(unit)
        results.append(
            {"kind": "cell", "cell": cell.key, "status": "done", "accuracy": 0.5, "stage": cell.stage}
            for cell in unit.cells
        )
    return done


def test_a_failing_cell_is_recorded_and_the_others_go_on(
    tmp_path: Path, method: Make, study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_or_fail(config: Any, **kwargs: Any) -> Any:
        if config["data"]["task_name"] == "near" and config["optimizer"]["lr"] == 1e-2:
            raise MemoryError("not enough")
        return real(config, **kwargs)

    real = cells.train
    monkeypatch.setattr(cells, "train", train_or_fail)
    grid = [{"optimizer.lr": 1e-2}, {"optimizer.lr": 1e-3}]
    chosen = study(method("vpt", grid, adapter={"method": "vpt", "num_tokens": 2}), seeds=[1])
    run_study(chosen, tmp_path)
    lines = _lines(tmp_path)
    failed = [line for line in lines if line["status"] == "failed"]
    assert [line["reason"] for line in failed] == ["MemoryError: not enough"] and failed[0]["task"] == "near"
    finals = {line["task"]: line["setting"] for line in lines if line["stage"] == "final"}
    assert set(finals) == {"near", "far"} and finals["near"] == {"optimizer.lr": 1e-3}

    monkeypatch.setattr(cells, "train", real)
    assert [*_ready(chosen, tmp_path)] == []
    retried = study(*chosen.methods, seeds=[1], retry=frozenset([(failed[0]["cell"], failed[0]["time"])]))
    assert [len(unit.cells) for unit in _ready(retried, tmp_path)] == [1]


def test_a_runner_that_ends_leaves_what_others_are_at(
    tmp_path: Path, method: Make, study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study of another method on the same folder comes to its end while a cell is trained."""
    other = study(method("linear_probe"), seeds=[1])
    other.tasks.pop()

    def train_meanwhile(config: Any, *, work_dir: Path, **kwargs: Any) -> Any:
        work_dir.mkdir(parents=True)
        run_study(other, tmp_path)
        assert work_dir.is_dir()
        return real(config, work_dir=work_dir, **kwargs)

    real = cells.train
    monkeypatch.setattr(cells, "train", train_meanwhile)
    chosen = study(method("vpt", None, adapter={"method": "vpt", "num_tokens": 2}), seeds=[1])
    chosen.tasks.pop()
    run_study(chosen, tmp_path)
    assert [line["status"] for line in _lines(tmp_path)] == ["done"] * 2
    assert not (tmp_path / "running").exists()


@pytest.mark.parametrize("label", ["linear_probe", "vpt"])
def test_a_full_disk_ends_the_study_and_fails_no_cell(
    label: str, tmp_path: Path, method: Make, study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        with explain_disk_errors(tmp_path):
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(cells, "train", full)
        patch.setattr(probes, "export", full)
        with pytest.raises(VizattnError, match=r"No space left on device.*--out"):
            run_study(study(method(label), seeds=[1]), tmp_path)
    assert not (tmp_path / "results.jsonl").exists()


def _ready(chosen: Study, folder: Path) -> list[Any]:
    results = Results(folder)
    results.read()
    return [*ready(chosen, results)]


def test_damaged_images_fail_their_task_alone(tmp_path: Path, method: Make, study: Make, tree: Path) -> None:
    damaged = tmp_path / "tree"
    shutil.copytree(tree, damaged)
    (damaged / "near" / "images" / "train800" / "000003.png").write_bytes(b"no image")
    run_study(study(method("linear_probe"), root=str(damaged)), tmp_path / "out")
    found = {line["task"]: line for line in _lines(tmp_path / "out")}
    assert found["far"]["status"] == "done" and found["near"]["status"] == "failed"
    assert "000003.png" in found["near"]["reason"]


def test_a_probe_that_the_engine_must_train_is_trained_by_it(tmp_path: Path, method: Make, study: Make) -> None:
    lars = method("linear_probe", None, optimizer={"name": "lars", "lr": 0.1})
    run_study(study(lars, seeds=[1]), tmp_path)
    assert [line["status"] for line in _lines(tmp_path)] == ["done", "done"]


def test_augmented_images_are_what_a_probe_is_trained_on(tmp_path: Path, method: Make, study: Make) -> None:
    for augment in ("none", "light"):
        data = {"batch_size": 8, "augment": augment}
        run_study(study(method("linear_probe", None, data=data), seeds=[1]), tmp_path / augment)
    plain, augmented = (_bundles(tmp_path / augment) for augment in ("none", "light"))
    assert len(plain) == len(augmented) == 2 and not set(plain) & set(augmented)


def _bundles(folder: Path) -> list[bytes]:
    return [(folder / line["bundle"] / "adapter_model.safetensors").read_bytes() for line in _lines(folder)]


def test_a_read_only_folder_is_one_message(tmp_path: Path, method: Make, study: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VizattnError, match="choose another folder with --out"):
        run_study(study(method()), tmp_path / "file" / "out")


def test_methods_with_other_recipes_have_other_keys(method: Make) -> None:
    one, other = method("linear_probe"), method("linear_probe", None, schedule={"epochs": 3})
    assert isinstance(one, Method) and one.key != other.key


def test_a_unit_that_kills_its_processes_is_given_up(tmp_path: Path, method: Make, study: Make) -> None:
    chosen = study(method("linear_probe", GRID))
    results = Results(tmp_path)
    unit = next(ready(chosen, results))
    _give_up(chosen, unit.id, results, _ending(-9))
    failed = _lines(tmp_path)
    assert {line["cell"] for line in failed} == {cell.key for cell in unit.cells}
    assert all("SIGKILL (killed, perhaps for want of memory)" in line["reason"] for line in failed)
    results.read()
    assert unit.id not in {other.id for other in ready(chosen, results)}
