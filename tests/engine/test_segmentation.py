"""Segmentation: losses and metrics against naive ones, whole runs, resuming, bundles that give the same masks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mmengine.runner.priority import get_priority
from PIL import Image

from vizattn import VizattnError
from vizattn.adapters import make_options
from vizattn.cli import main
from vizattn.engine import as_published, evaluate, load_recipe, load_trained, train
from vizattn.engine.config import apply_overrides, resolve_config
from vizattn.engine.ema import EmaHook
from vizattn.engine.models import build_segmenter
from vizattn.engine.pictures import OverlayHook, overlay
from vizattn.engine.recipes import list_recipes
from vizattn.engine.segmentation import SegmentationMetric, confusion, dice_loss, inference_options, iou_of
from vizattn.heads import build

TINY = {"name": "vit_va_nano_patch4_32", "pretrained": False, "patch_size": 8, "embed_dim": 32, "depth": 3}
TINY |= {"num_heads": 2}
PYRAMID = {"name": "efficientvit_va_nano", "pretrained": False, "embed_dims": [16, 32, 32], "depths": [1, 1, 1]}
PYRAMID |= {"num_heads": [1, 2, 2]}


def recipe(**changes: Any) -> dict[str, Any]:
    """4 iterations of 4 scenes, 2 epochs, on a tiny ViT."""
    return {
        "task": "segmentation",
        "model": dict(TINY),
        "head": {"name": "linear"},
        "data": {"name": "scenes", "length": 16, "batch_size": 4},
        "schedule": {"epochs": 2},
        "logging": {"interval": 2},
    } | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run, which several tests look at."""
    torch.set_num_threads(1)
    return train(recipe(), work_dir=tmp_path_factory.mktemp("segmentation") / "run", quiet=True)


def test_metric_is_a_naive_count_of_pixels() -> None:
    rng = np.random.default_rng(0)
    classes = 5
    metric = SegmentationMetric([f"c{k}" for k in range(classes)])
    intersection, union, labelled, hit = (np.zeros(classes) for _ in range(4))
    total = right = 0
    for _ in range(7):
        size = tuple(rng.integers(3, 9, 2))
        labels, predicted = (
            rng.integers(0, 3, size),
            rng.integers(0, 4, size),
        )  # class 4 is never seen, class 3 never labelled
        labels[rng.random(size) < 0.2] = 255
        metric.process((None, torch.from_numpy(labels)[None]), [torch.from_numpy(predicted)])
        for a, b in zip(labels.ravel(), predicted.ravel()):
            if a == 255:
                continue
            total, right = total + 1, right + (a == b)
            labelled[a] += 1
            hit[a] += a == b
            for k in {a, b}:
                union[k] += 1
            intersection[a] += a == b
    found = metric.evaluate(7)
    assert found["samples"] == 7
    assert found["aacc"] == pytest.approx(right / total, rel=1e-12)
    assert found["macc"] == pytest.approx(np.mean([hit[k] / labelled[k] for k in range(3)]), rel=1e-12)
    assert found["miou"] == pytest.approx(np.mean([intersection[k] / union[k] for k in range(4)]), rel=1e-12)
    assert found["iou_per_class"]["c4"] is None
    assert found["iou_per_class"]["c3"] == 0.0


def test_metric_refuses_to_average_nothing() -> None:
    metric = SegmentationMetric(["a", "b"])
    metric.process((None, torch.full((1, 4, 4), 255)), [torch.zeros(4, 4)])
    with pytest.raises(VizattnError, match="no labelled pixel in 1 image"):
        metric.evaluate(1)


def test_confusion_counts_labels_by_rows() -> None:
    matrix = confusion(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 255]]), 2)
    assert matrix.tolist() == [[1, 1], [0, 1]]
    iou, accuracy = iou_of(matrix.double())
    assert iou.tolist() == [0.5, 0.5] and accuracy.tolist() == [0.5, 1.0]


def test_dice_loss_is_its_definition_without_ignored_pixels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    labels[0, 0, :3] = 255
    probabilities, dice = logits.softmax(1), []
    for k in range(3):
        overlap = total = 0.0
        for b, y, x in np.ndindex(2, 4, 5):
            if labels[b, y, x] != 255:
                p, t = probabilities[b, k, y, x].item(), float(labels[b, y, x] == k)
                overlap, total = overlap + p * t, total + p + t
        dice.append((2 * overlap + 1) / (total + 1))
    assert dice_loss(logits, labels).item() == pytest.approx(1 - sum(dice) / 3, rel=1e-12)


def test_a_run_evaluates_the_same_from_what_it_wrote(run: Any) -> None:
    folder = Path(run.work_dir)
    assert set(run.best) == {"miou", "epoch"}
    assert 0 < run.metrics["test"]["miou"] <= 1 and run.metrics["test"]["samples"] == 16
    assert evaluate(folder) == run.metrics["test"]
    trained = load_trained(folder / "model")
    assert trained.palette is not None and len(trained.palette) == len(trained.class_names)
    best = load_trained(folder / "checkpoints" / "best.pth")
    assert best.class_names == trained.class_names
    page = (folder / "report.html").read_text()
    assert "IoU of each class" in page and page.count("<img") >= 5 and "http" not in page.replace("http-equiv", "")


def test_images_are_normalised_as_the_backbone_was_trained(run: Any, tmp_path: Path) -> None:
    pyramid = train(recipe(model=dict(PYRAMID), schedule={"epochs": 1}), work_dir=tmp_path / "run", quiet=True)
    for folder in (run.work_dir, pyramid.work_dir):
        stored = load_trained(Path(folder) / "model").preprocessing
        assert stored["mean"] == stored["std"] == [0.5] * 3 and stored["input_size"] == [3, 32, 32]


def test_a_pyramid_learns_with_auxiliary_head_dice_and_poly(tmp_path: Path) -> None:
    losses: list[float] = []
    changes = {
        "model": dict(PYRAMID),
        "head": {"name": "semantic_fpn", "fpn_dim": 16, "dim": 16, "auxiliary": True},
        "optimizer": {"lr": 0.01, "head_lr_mult": 2.0},
        "loss": {"dice": 0.5},
        "schedule": {"epochs": 3, "name": "poly", "power": 0.9},
        "validation": {"interval_epochs": 2},
    }
    train(recipe(**changes), work_dir=tmp_path, quiet=True, progress=lambda *event: losses.append(event[2]["loss"]))
    assert len(losses) == 12 and losses[-1] < losses[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.015  # of the head
    assert [line["epoch"] for line in lines if "val" in line] == [2, 3]


def test_resuming_ends_in_the_same_weights(tmp_path: Path) -> None:
    changed = recipe(data={"name": "scenes", "length": 16, "batch_size": 4, "augment": "standard", "crop_size": 48})
    whole = train(changed, work_dir=tmp_path / "whole", quiet=True)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, values: dict[str, float]) -> None:
        if done == 6:
            raise Stop

    changed["checkpoint"] = {"interval_iters": 5}
    with pytest.raises(Stop):
        train(changed, work_dir=tmp_path / "parts", quiet=True, progress=stop)
    parts = train(changed, work_dir=tmp_path / "parts", quiet=True, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()))
    assert parts.metrics == whole.metrics


@pytest.mark.parametrize("method", ["linear_probe", "vpt", "apla", "hst", "efficient_probing"])
def test_bundles_of_frozen_backbones_give_the_same_masks(method: str, tmp_path: Path) -> None:
    side = {"widths": [8, 16, 24, 32], "num_heads": [1, 2, 2, 4]}
    options = {"vpt": {"num_tokens": 2}, "apla": {"num_rows": 4}, "hst": side}
    changed = recipe(
        model={"name": "vit_va_nano_patch4_32", "pretrained": True},
        adapter={"method": method, **options.get(method, {})},
        data={"name": "scenes", "length": 4, "batch_size": 4},
        schedule={"epochs": 1},
    )
    result = train(changed, work_dir=tmp_path, quiet=True)
    assert result.params["without_head"] < result.params["with_head"] < result.params["total"]
    assert evaluate(tmp_path / "bundle") == result.metrics["test"]


def test_predict_writes_masks_that_the_metric_agrees_with(run: Any, tmp_path: Path) -> None:
    from vizattn.data import build_dataset

    dataset: Any = build_dataset("scenes", "test", length=16)
    pictures, counts = tmp_path / "pictures", torch.zeros(len(run.class_names), len(run.class_names))
    pictures.mkdir()
    for i in range(len(dataset)):
        dataset[i][0].save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    found = tmp_path / "found.json"
    arguments = ["predict", str(pictures), "--bundle", run.work_dir, "--masks", str(tmp_path / "masks")]
    assert main([*arguments, "--format", "json", "--output", str(found)]) == 1  # one is named as unreadable
    rows = {Path(row["image"]).stem: row for row in json.loads(found.read_text())}
    assert "error" in rows["broken"]
    for i in range(len(dataset)):
        mask = Image.open(tmp_path / "masks" / f"{i}.png")
        assert mask.mode == "P" and mask.size == (64, 64)
        assert Image.open(rows[str(i)]["overlay"]).size == (64, 64)
        predicted = torch.from_numpy(np.asarray(mask).astype(int))
        counts += confusion(predicted, torch.from_numpy(dataset[i][1]), len(counts))
    assert iou_of(counts.double())[0].nanmean().item() == pytest.approx(run.metrics["test"]["miou"], abs=1e-12)
    assert (tmp_path / "masks" / "legend.png").is_file()


def test_predict_never_writes_two_pictures_to_one_file(run: Any, tmp_path: Path) -> None:
    names = ["legend.png", "cat.png", "cat_overlay.png", "cat_overlay_2.png"]
    given = tmp_path / "given"
    given.mkdir()
    for shade, name in enumerate(names):
        Image.new("RGB", (8, 8), (shade,) * 3).save(given / name)
    arguments = ["predict", str(given), "--bundle", run.work_dir, "--masks"]
    assert main([*arguments, str(tmp_path / "masks"), "--output", str(tmp_path / "found.txt")]) == 0
    assert len(list((tmp_path / "masks").iterdir())) == 2 * len(names) + 1
    assert main([*arguments, str(given)]) != 0
    assert sorted(path.name for path in given.iterdir()) == sorted(names)
    assert all(Image.open(given / name).getpixel((0, 0)) == (shade,) * 3 for shade, name in enumerate(names))


def test_a_checkpoint_and_the_export_give_the_same_colours(run: Any) -> None:
    best = load_trained(Path(run.work_dir) / "checkpoints" / "best.pth")
    assert best.palette is not None
    assert [list(colour) for colour in best.palette] == load_trained(run.work_dir).palette


def test_an_overlay_paints_classes_and_darkens_where_they_meet() -> None:
    """Ignored pixels and those of a black class stay as they are."""
    mask = np.repeat(np.array([[0, 1, 255, 2]], dtype=np.uint8), [1, 3, 1, 2], axis=1)
    painted = overlay(Image.new("RGB", (7, 1), (90, 120, 31)), mask, [(0, 0, 0), (200, 0, 30), (0, 255, 0)])
    plain, one, two = (90, 120, 31), (145, 60, 30), (45, 187, 15)
    dark = [tuple(value // 3 for value in colour) for colour in (plain, one, plain)]
    assert [painted.getpixel((x, 0)) for x in range(7)] == [dark[0], one, one, dark[1], dark[2], two, two]


def test_sample_pictures_show_the_averaged_weights_that_were_measured() -> None:
    assert get_priority(OverlayHook.priority) < get_priority(EmaHook.priority)


def test_no_backbone_is_published_with_a_segmentation_head() -> None:
    with pytest.raises(VizattnError, match="heads for classification; the recipe's task is segmentation"):
        as_published(recipe())


def test_eval_prints_the_iou_of_each_class(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", run.work_dir]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in run.class_names)
    assert "mIoU" in shown and f"{run.metrics['test']['miou']:.2%}" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"name": "upernett"}}, "Unknown head.name 'upernett'|head.name must be one of"),
        ({"data": {"name": "digits"}}, "data.name must be one of 'scenes', 'segmentation_folder', not 'digits'"),
        ({"loss": {"mixup": 0.2}}, "loss.mixup is for classification, but the recipe's task is segmentation"),
        ({"task": "classification"}, "head is for segmentation, but the recipe's task is classification"),
        ({"task": "detection"}, "task must be one of 'classification', 'segmentation', not 'detection'"),
    ],
)
def test_options_belong_to_their_task(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        resolve_config(recipe(**changes))


@pytest.mark.parametrize("option", [{"num_classes": 3}, {"dim": "wide"}])
def test_senseless_options_of_a_head_are_mistakes(option: dict[str, Any]) -> None:
    config = resolve_config(recipe(head={"name": "upernet", **option}))
    with pytest.raises(VizattnError, match=f"Cannot make the head 'upernet' with .*{next(iter(option))}"):
        build_segmenter(config, 8)


def test_windows_are_those_of_training_unless_told() -> None:
    base = {"task": "segmentation", "model": {"name": "x"}, "data": {"name": "scenes", "crop_size": [48, 60]}}
    whole = inference_options(resolve_config(base))
    assert whole == {"mode": "whole", "flip": False, "scales": (1.0,)}
    slide = inference_options(resolve_config({**base, "inference": {"mode": "slide"}}))
    assert slide["crop_size"] == (48, 60) and slide["stride"] == (32, 40)
    with pytest.raises(VizattnError, match=r"need inference\.crop_size or data\.crop_size"):
        inference_options(resolve_config(apply_overrides(base, {"inference.mode": "slide", "data.crop_size": None})))


def test_every_recipe_of_segmentation_names_what_exists() -> None:
    names = [name for name in list_recipes() if name.startswith("segmentation/")]
    assert len(names) > 20
    for name in names:
        config = resolve_config(load_recipe(name))
        options = {key: value for key, value in config["head"].items() if key not in ("name", "auxiliary")}
        build(config["head"]["name"], [8, 8, 8, 8], [4, 8, 16, 32], 3, **options)
        assert timm.is_model(config["model"]["name"].partition(".")[0])
        if config["adapter"]:
            given = dict(config["adapter"])
            make_options(given.pop("method"), given)


def test_two_processes_measure_each_image_once(run: Any) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "vizattn", "eval", run.work_dir, "--split", "val", "--json"]
    command += ["--cfg-options", "data.length=7"]  # an odd number
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["samples"] == 7
    alone = evaluate(run.work_dir, split="val", overrides={"data.length": 7})
    assert {key: found[key] for key in alone} == alone
