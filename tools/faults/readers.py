"""The readers of the library, each with a whole file to damage and what may come of reading it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import hostile
from faults.fixtures import RELEASE

__all__ = ["READERS", "Reader"]


@dataclass(frozen=True)
class Reader:
    """A way to read a file."""

    name: str
    prepare: Callable[[Path, Path], Path]
    """Given the fixtures and an empty folder: puts there what is read, and gives the file to damage."""
    read: Callable[[Path], Any]
    """Reads that file, or the folder it is in; what it gives is compared."""
    same: bool = False
    """Whether whatever can be read must be what was there before the damage: its format has checksums."""
    errors: tuple[str, ...] = ("VizattnError",)
    """Names of what it may raise."""
    made: Callable[[bytes], dict[str, bytes]] = lambda whole: {}
    """Hostile files by name, given the whole one."""
    json: bool = False
    """Whether the file is JSON, and its values are damaged, too."""
    known: Callable[[Any, Any], bool] | None = None
    """Given what was read and what was there: whether the former is nothing that was never written."""
    cost: float = 1.0
    """Of one reading, relative to the others."""


def _folder(source: str, name: str) -> Callable[[Path, Path], Path]:
    def prepare(fixtures: Path, folder: Path) -> Path:
        shutil.copytree(fixtures / source, folder / "x", dirs_exist_ok=True)
        return folder / "x" / name

    return prepare


def _file(source: str) -> Callable[[Path, Path], Path]:
    return lambda fixtures, folder: Path(shutil.copy(fixtures / source, folder))


def _text(name: str, text: str) -> Callable[[Path, Path], Path]:
    def prepare(fixtures: Path, folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return prepare


def _state(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _silent() -> logging.Logger:
    logger = logging.getLogger("silent")
    logger.disabled = True
    return logger


def _trained(path: Path) -> Any:
    """A bundle or a model folder, and how images are prepared for it."""
    from vizattn.engine.evaluate import load_trained
    from vizattn.engine.predict import Predictor

    trained = load_trained(path.parent)
    predictor = Predictor(trained)
    from PIL import Image

    image = Image.new("RGB", (40, 32), "red")
    if predictor.segments:
        predictor.segment(image, 2)
    else:
        predictor.classify([predictor.transform(image)], 2)
    return _state(trained.model.state_dict())


def _checkpoint(path: Path) -> Any:
    from vizattn.engine.checkpoint import read_checkpoint

    state = read_checkpoint(path)
    return _state(state["model"]), str(state["config"]), str(state.get("optimizer"))


def _trained_checkpoint(path: Path) -> Any:
    from vizattn.engine.evaluate import load_trained

    return _state(load_trained(path).model.state_dict())


@functools.cache
def _newest_state() -> str:
    """Of the whole file, which is the first that is read."""
    from vizattn.engine.checkpoint import read_checkpoint

    return _state(read_checkpoint(Path("x") / "iter_00000020.pth")["model"])


def _newest(path: Path) -> Any:
    """The newest checkpoint that is whole: the damaged one as it was, or the one before it."""
    from vizattn.engine.checkpoint import load_newest, read_checkpoint

    state = load_newest(path.parent, _silent())
    assert state is not None
    if state["iteration"] != 20:
        before = read_checkpoint(path.with_name(f"iter_{state['iteration']:08d}.pth"))
        return "whole" if _state(before["model"]) == _state(state["model"]) else "another"
    return "whole" if _state(state["model"]) == _newest_state() else "another"


def _weights(path: Path) -> Any:
    from timm.models import get_pretrained_cfg

    from vizattn.weights.convert import converted
    from vizattn.weights.reading import read_weights

    cfg = get_pretrained_cfg(RELEASE)
    assert cfg is not None
    converted(read_weights(path), cfg)
    return None


def _lock_file(path: Path) -> Any:
    import os

    from vizattn.weights.trust import trusted

    os.environ["VIZATTN_LOCK"] = str(path)
    return trusted(RELEASE)


def _cached_weights(path: Path) -> Any:
    from vizattn.weights.convert import metadata_of

    return metadata_of(path)


def _recipe(path: Path) -> Any:
    from vizattn.engine.config import resolve_config
    from vizattn.engine.recipes import load_recipe, recipe_title

    resolve_config(load_recipe(path))
    return recipe_title(path)


def _image(path: Path) -> Any:
    from vizattn.data.images import unreadable
    from vizattn.engine.predict import read_image

    problems = unreadable([str(path)], whole=True)
    unreadable([str(path)], whole=False)
    if problems:
        raise OSError(problems[str(path)])
    read_image(path)


def _mask(path: Path) -> Any:
    from vizattn.data.masks import palette_of, read_mask

    palette_of(str(path), 3)
    read_mask(path)


def _pairs(path: Path) -> Any:
    """A folder of images and masks, all of them, as training and `data check` read it."""
    from vizattn.data.audit import audit
    from vizattn.data.segmentation import SegmentationFolder

    root = path.parents[2] if path.suffix == ".png" else path.parent
    audit(root)
    for split in ("train", "val"):
        dataset = SegmentationFolder(root, split)
        for place in range(min(3, len(dataset))):
            dataset[place]


def _class_folder(path: Path) -> Any:
    from vizattn.data.folder import ImageFolder

    for split in ("train", "val", "test"):
        dataset = ImageFolder(path.parents[2], split)
        for place in range(len(dataset)):
            dataset[place]


def _class_names(path: Path) -> Any:
    from vizattn.data.class_names import names_in

    names_in(path)


def _list(path: Path) -> Any:
    from vizattn.data.transfer.lists import read_list

    read_list(path, 3)


def _json_list(path: Path) -> Any:
    from vizattn.data.transfer.lists import number_labels, read_json

    number_labels([label for _, label in read_json(path)], 3, path)


def _suite(path: Path) -> Any:
    from vizattn.data.transfer import get_suite

    get_suite(path)


def _results(path: Path) -> Any:
    """All lines that are whole must be read; and a report is written of them."""
    from vizattn.data.transfer import get_suite
    from vizattn.engine.vtab.report import write_reports
    from vizattn.engine.vtab.results import Results

    results = Results(path.parent)
    results.read()
    summary = {line["cell"]: line for line in results.cells()}
    write_reports(results, get_suite(path.parent / "tiny.json"), path.parent / "report")
    return summary


def _metrics(path: Path) -> Any:
    """What a resumed run and a report make of the lines of metrics."""
    from types import SimpleNamespace

    from vizattn.engine.hooks import JsonLinesHook
    from vizattn.engine.run_report import training_section

    hook = JsonLinesHook(path, 1)
    hook.before_train(SimpleNamespace(iter=10))
    training_section(SimpleNamespace(work_dir=path.parent), "accuracy", "accuracy")


@functools.cache
def _nano() -> Any:
    import timm
    import torch

    import vizattn

    torch.manual_seed(0)
    return vizattn.attach(timm.create_model("vit_va_nano_patch4_32"), "linear_probe")


def _cached(folder: Path) -> Any:
    import torch
    from torch.utils.data import TensorDataset

    from vizattn.engine.features import cached_features

    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
    data = TensorDataset(images, torch.tensor([0, 1]))
    how: dict[str, Any] = {"amp": False, "batch_size": 2, "num_workers": 0, "description": "", "display": "quiet"}
    return cached_features(_nano(), data, "key", folder=folder, logger=_silent(), **how)


def _cache_of(name: str) -> Callable[[Path, Path], Path]:
    def prepare(fixtures: Path, folder: Path) -> Path:
        _cached(folder)
        return folder / name

    return prepare


def _features(path: Path) -> Any:
    """Cached features: what is damaged is computed again, so that they are always the same."""
    found = _cached(path.parent)
    return [(features.double().sum().item(), label) for features, label in (found[0], found[1])], len(found)


def _study(fixtures: Path, folder: Path) -> Path:
    shutil.copy(fixtures / "tasks" / "tiny.json", folder)
    params = {"with_head": 10, "without_head": 2, "total": 12}
    about = {"kind": "cell", "suite": "tiny", "backbone": "b", "method": "m", "row": "r", "adapter": {"method": "vpt"}}
    measured = {"accuracy": 0.5, "samples": 30, "params": params, "seconds": 1.0, "peak_memory_mb": 9.5, "run": "0"}
    lines: list[dict[str, Any]] = [
        {"format": 1, "kind": "run", "id": "0", "config": {}, "weights": "w", "versions": {}}
    ]
    lines[0] |= {"command": "c", "preprocessing": {}}
    for number, task in enumerate(("near", "far", "near", "far")):
        place = {"cell": f"{number}", "task": task, "group": f"{task}-group", "seed": number, "time": 1.0, "host": "h"}
        stage = {"stage": "final" if number < 3 else "select", "split": "test", "setting": {"optimizer.lr": 0.1}}
        end = {"status": "done", **measured} if number != 2 else {"status": "failed", "reason": "no memory"}
        lines.append({"format": 1, **about, **place, **stage, **end})
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "results.jsonl"


def _study_with_checksums(fixtures: Path, folder: Path) -> Path:
    from vizattn.engine.vtab.results import Results

    path = _study(fixtures, folder)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    Results(folder).append(lines)
    return path


def _jpegs(format_: str) -> Callable[[Path, Path], Path]:
    def prepare(fixtures: Path, folder: Path) -> Path:
        from PIL import Image

        image = Image.open(fixtures / "pictures" / "test" / "left" / "0.png")
        path = folder / f"x.{format_.lower()}"
        image.convert("P" if format_ == "GIF" else "RGB").save(path, format_)
        return path

    return prepare


def _part_note(path: Path) -> Any:
    """What an interrupted download left beside its part."""
    from vizattn.weights.download import PATIENCE, _Download
    from vizattn.weights.trust import Trusted

    path.with_name("x.pth.part").write_bytes(b"half")
    _Download("http://127.0.0.1/x", path.with_name("x.pth"), Trusted(), PATIENCE, lambda done, total: None)._resumable()


def _pickles(whole: bytes) -> dict[str, bytes]:
    return hostile.pickles() | hostile.safetensors()


def _json_files(whole: bytes) -> dict[str, bytes]:
    return hostile.json_files()


def _texts(whole: bytes) -> dict[str, bytes]:
    return hostile.texts()


def _among(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Lines may be lost with the bytes they were in; no other may come in their place."""
    return all({**line, **expected.get(cell, {"": None})} == line for cell, line in found.items())


_METRICS = (
    "".join(
        json.dumps({"iteration": i, "epoch": 1, "loss": 1.5, "lr": 0.1, "seconds": 2.0}) + "\n" for i in range(1, 6)
    )
    + json.dumps({"iteration": 5, "epoch": 1, "val": {"accuracy": 0.5, "loss": 1.0}})
    + "\n"
)
_LIST = "".join(f"images/test/{i:06d}.png {i % 3}\n" for i in range(12))
_JSON_LIST = json.dumps({f"images/test/{i:06d}.png": i % 3 for i in range(12)})
_LOCK = json.dumps({RELEASE: {"source": "http://127.0.0.1/x", "size": 10, "sha256": "0" * 64}})
_NOTE = json.dumps({"url": "http://127.0.0.1/x", "validator": '"v1"'})
_RECIPE = (
    '"""A recipe."""\n\nmodel = dict(name="vit_va_nano_patch4_32", pretrained=True)\n'
    'adapter = dict(method="vpt", num_tokens=2)\ndata = dict(name="digits", batch_size=6)\nseed = 3\n'
)
_OS = ("VizattnError", "OSError")

READERS = [
    Reader(
        "bundle config", _folder("run0/bundle", "adapter_config.json"), _trained, made=_json_files, json=True, cost=4
    ),
    Reader(
        "bundle weights", _folder("run0/bundle", "adapter_model.safetensors"), _trained, True, made=_pickles, cost=4
    ),
    Reader("segmenter config", _folder("segmenter/bundle", "adapter_config.json"), _trained, json=True, cost=4),
    Reader("model note", _folder("whole/model", "model.json"), _trained, made=_json_files, json=True, cost=4),
    Reader("model weights", _folder("whole/model", "model.safetensors"), _trained, True, made=_pickles, cost=4),
    Reader("checkpoint", _folder("run0/checkpoints", "iter_00000020.pth"), _checkpoint, True, _OS, _pickles),
    Reader(
        "checkpoint to load", _folder("whole/checkpoints", "iter_00000020.pth"), _trained_checkpoint, True, _OS, cost=4
    ),
    Reader("newest checkpoint", _folder("run0/checkpoints", "iter_00000020.pth"), _newest, True, _OS, _pickles, cost=2),
    Reader("released weights", _folder("published", f"{RELEASE}.pth"), _weights, False, _OS, _pickles, cost=8),
    Reader("cached weights", _folder("whole/model", "model.safetensors"), _cached_weights, False, _OS, _pickles),
    Reader("lock file", _text("lock.json", _LOCK), _lock_file, False, _OS, _json_files, json=True),
    Reader("note of a download", _text("x.pth.part.json", _NOTE), _part_note, made=_json_files, json=True),
    Reader("recipe.json", _file("recipe.json"), _recipe, made=_json_files, json=True),
    Reader("recipe.py", _text("recipe.py", _RECIPE), _recipe, made=_texts, cost=2),
    Reader("PNG", _jpegs("PNG"), _image, False, _OS, lambda whole: hostile.images()),
    *(Reader(name, _jpegs(name), _image, False, _OS) for name in ("JPEG", "GIF", "TIFF", "WEBP", "BMP")),
    Reader("mask", _folder("pairs/masks/test", "0.png"), _mask, False, _OS, lambda whole: hostile.images()),
    Reader("pairs", _folder("pairs", "masks/train/0.png"), _pairs, made=lambda whole: hostile.images(), cost=6),
    Reader("class folder", _folder("pictures", "train/left/0.png"), _class_folder, cost=6),
    Reader("class names", _text("classes.txt", "cat\ndog\n2: bird\n".replace("2: ", "")), _class_names, made=_texts),
    Reader("numbered class names", _text("classes.txt", "0: cat\n1: dog\n3: cow\n"), _class_names, made=_texts),
    Reader("class names of pairs", _folder("pairs", "classes.txt"), _pairs, made=_texts, cost=6),
    Reader("list", _text("test.txt", _LIST), _list, made=_texts),
    Reader("JSON list", _text("test.json", _JSON_LIST), _json_list, made=_json_files, json=True),
    Reader("suite", _file("tasks/tiny.json"), _suite, made=_json_files, json=True),
    Reader("results", _study_with_checksums, _results, False, _OS, hostile.lines, cost=4, known=_among),
    Reader("results without checksums", _study, _results, False, _OS, hostile.lines, cost=4),
    Reader("metrics", _text("metrics.jsonl", _METRICS), _metrics, False, _OS, hostile.lines),
    Reader("cached features", _cache_of("key.npy"), _features, True, _OS, _pickles, cost=2),
    Reader("note of features", _cache_of("key.json"), _features, True, _OS, _json_files, json=True, cost=2),
]
