"""Damaged files through the command line: a sample, each by the commands that read it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import hostile
from faults.campaign import Case, Trial
from faults.command import misbehaviour, vizattn
from faults.damage import IN_PLACE, damage_bytes, damage_json
from faults.fixtures import RELEASE
from faults.hostile import SENTINEL

__all__ = ["CASES"]


@dataclass(frozen=True)
class Line:
    """Commands that read `target`, a file below ``x``, a copy of the fixtures."""

    name: str
    target: str
    commands: tuple[str, ...]
    made: Callable[[bytes], dict[str, bytes]] = lambda whole: {}
    allowed: tuple[int, ...] = (0, 1, 2)


def _pickles(whole: bytes) -> dict[str, bytes]:
    return hostile.pickles()


def _json(whole: bytes) -> dict[str, bytes]:
    return hostile.json_files()


_STUDY = "vtab run --suite x/tasks/tiny.json --root x/tasks --adapter linear_probe --backbone vit_va_nano_patch4_32"
LINES = [
    Line(
        "bundle config",
        "run0/bundle/adapter_config.json",
        (
            "predict x/pictures/test --bundle x/run0",
            "eval x/run0",
            "bundle show x/run0 --load",
            "bundle diff x/run0 x/run1",
            "bundle merge x/run0 --out merged",
            "bundle average x/run0 x/run1 --out averaged",
            "publish x/run0 --dry-run published",
            "attend x/pictures/test/left/0.png --bundle x/run0 --out maps",
        ),
        _json,
    ),
    Line(
        "bundle weights",
        "run0/bundle/adapter_model.safetensors",
        ("predict x/pictures/test --bundle x/run0", "bundle show x/run0", "bundle diff x/run0 x/run1"),
        lambda whole: hostile.safetensors(),
    ),
    Line("model note", "whole/model/model.json", ("eval x/whole", "publish x/whole --dry-run published"), _json),
    Line(
        "model weights", "whole/model/model.safetensors", ("eval x/whole", "predict x/pictures/test --bundle x/whole")
    ),
    Line(
        "newest checkpoint",
        "run0/checkpoints/iter_00000020.pth",
        (
            "train x/recipe.json --work-dir x/run0 --resume",
            "eval x/run0/checkpoints/iter_00000020.pth",
            "predict x/pictures/test --bundle x/run0/checkpoints/iter_00000020.pth",
        ),
        _pickles,
    ),
    Line("metrics", "run0/metrics.jsonl", ("train x/recipe.json --work-dir x/run0 --resume",), hostile.lines),
    Line("recipe", "recipe.json", ("train x/recipe.json --work-dir new --epochs 2", "eval x/recipe.json"), _json),
    Line(
        "picture",
        "pictures/train/left/0.png",
        ("train x/recipe.json --work-dir new --epochs 2", "predict x/pictures/train --bundle x/run0 --format csv"),
        lambda whole: hostile.images(),
    ),
    Line(
        "picture alone",
        "pictures/test/left/0.png",
        (
            "predict x/pictures/test/left/0.png --bundle x/run0 --format json",
            "predict x/pictures/test/left/0.png --bundle x/segmenter --save-overlay over",
            "attend x/pictures/test/left/0.png --bundle x/run0 --out maps",
        ),
        lambda whole: hostile.images(),
    ),
    Line(
        "mask",
        "pairs/masks/train/0.png",
        ("data check x/pairs", "train x/pairs.json --work-dir new"),
        lambda whole: hostile.images(),
    ),
    Line(
        "class names",
        "pairs/classes.txt",
        ("data check x/pairs", "train x/pairs.json --work-dir new"),
        lambda whole: hostile.texts(),
    ),
    Line(
        "suite",
        "tasks/tiny.json",
        (f"{_STUDY} --dry-run", "vtab check --suite x/tasks/tiny.json --root x/tasks"),
        _json,
    ),
    Line(
        "list",
        "tasks/near/train800.txt",
        ("vtab check --suite x/tasks/tiny.json --root x/tasks", f"{_STUDY} --seeds 1 --sweep none --out x/study"),
        lambda whole: hostile.texts(),
    ),
    Line(
        "published weights",
        f"published/{RELEASE}.pth",
        (
            f"weights fetch {RELEASE} --from x/published/{RELEASE}.pth",
            f"weights convert x/published/{RELEASE}.pth {RELEASE} --output converted.safetensors",
        ),
        _pickles,
    ),
]


def _through(line: Line) -> Callable[[Trial], Iterator[str | None]]:
    def run(trial: Trial) -> Iterator[str | None]:
        shutil.copytree(trial.stage.fixtures, trial.folder / "x")
        for recipe in ("recipe.json", "pairs.json"):  # their data is that of the copy
            path = trial.folder / "x" / recipe
            path.write_text(path.read_text().replace(str(trial.stage.fixtures), "x"))
        path = trial.folder / "x" / line.target
        told = _spoil(line, path, trial)
        command = trial.random.choice(line.commands)
        ended = vizattn(command.split(), trial.folder, trial.stage.env(trial.folder))
        problem = misbehaviour(ended, line.allowed)
        if any(trial.folder.rglob(SENTINEL)):
            problem = "code of the file was run"
        yield f"{line.target}, {told}, vizattn {command}: {problem}" if problem else None

    return run


def _spoil(line: Line, path: Path, trial: Trial) -> str:
    whole, moments = path.read_bytes(), trial.random
    made = [*line.made(whole).items()]
    path.unlink()
    kind = moments.random()
    if kind < 0.2:
        told = moments.choice([*IN_PLACE])
        IN_PLACE[told](path)
        return told
    if kind < 0.5 and made:
        told, data = moments.choice(made)
    elif path.suffix == ".json" and kind < 0.8:
        told, data = damage_json(whole, moments)
    else:
        told, data = damage_bytes(whole, moments)
    path.write_bytes(data)
    return told


def _odd_names(trial: Trial) -> Iterator[str | None]:
    """Names of files that cannot be printed, or mean something to somebody."""
    source = trial.stage.fixtures / "pictures" / "test" / "left" / "0.png"
    folder = trial.folder / "pictures"
    for name in (
        b"\xff\xfe.png",
        b"a\nb.png",
        b"[bold]x.png",
        b"-x.png",
        b"=1+1.png",
        b"%s{}.png",
        "\u202e.png".encode(),
    ):
        path = os.fsencode(folder) + b"/" + trial.random.choice((b"a", b"b")) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(os.fsencode(source), path)
    encoding = trial.random.choice(("utf-8", "ascii", "latin-1"))
    env = trial.stage.env(trial.folder) | {"PYTHONIOENCODING": encoding}
    bundle = str(trial.stage.fixtures / "run0")
    for more in (
        ["--format", "table"],
        ["--format", "csv", "--output", "x.csv"],
        ["--format", "json", "--save-overlay", "over"],
    ):
        ended = vizattn(["predict", "pictures", "--bundle", bundle, *more], trial.folder, env)
        problem = misbehaviour(ended, (0,))
        yield f"predict {' '.join(more)}, {encoding}: {problem}" if problem else None
    changes = ["data.root=pictures", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    recipe = str(trial.stage.fixtures / "recipe.json")
    ended = vizattn(["train", recipe, "--work-dir", "run", "--cfg-options", *changes], trial.folder, env)
    problem = misbehaviour(ended, (0, 2))
    yield f"train, {encoding}: {problem}" if problem else None


CASES = [
    *(Case("lines", line.name, _through(line)) for line in LINES),
    Case("lines", "odd names", _odd_names),
]
