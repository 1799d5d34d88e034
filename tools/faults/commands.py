"""The commands that write, each with what is there before, how to go on, and how to tell whole results."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.command import misbehaviour, vizattn
from faults.fixtures import RELEASE
from faults.stage import Stage

__all__ = ["COMMANDS", "Command", "Parts", "Undisturbed", "differs", "half", "undisturbed"]

Parts = dict[str, str]
"""What is in a folder: the name of each part that must be whole, and what it holds, as a hash or a number."""


@dataclass(frozen=True)
class Command:
    """A command that writes into ``out`` of the folder it runs in."""

    name: str
    args: Callable[[Path], list[str]]
    """Of the fixtures."""
    parts: Callable[[Path], Parts]
    """Of ``out``, by looking at the files alone; it raises where one is not whole."""
    old: Callable[[Path, Path], object] = lambda fixtures, out: None
    """Puts there what an earlier command left; given the fixtures and ``out``."""
    go_on: tuple[str, ...] = ()
    """Arguments that make it go on after an interruption."""
    launcher: tuple[str, ...] = ("-m", "vizattn")
    """Words between python and the arguments."""


@dataclass(frozen=True)
class Undisturbed:
    """What a command does when nobody disturbs it."""

    old: Parts
    new: Parts
    seconds: float
    changes: list[float]
    """Seconds from its start to each change of a file."""
    largest: int
    """Bytes of the largest file it leaves."""
    size: int
    """Bytes of all."""


def undisturbed(stage: Stage, command: Command) -> Undisturbed:
    """Of this command; run once in a campaign."""
    return stage.once(f"undisturbed {command.name}", lambda: _measure(stage, command))


def _measure(stage: Stage, command: Command) -> Undisturbed:
    fixtures, folder = stage.fixtures, stage.folder / command.name.replace(" ", "-")
    folder.mkdir()
    out = folder / "out"
    command.old(fixtures, out)
    old, count = command.parts(out), folder / "changes"
    faults = {"FOLDER": str(folder), "COUNT": str(count)}
    ended = vizattn(command.args(fixtures), folder, stage.env(folder), faults=faults, launcher=command.launcher)
    if problem := misbehaviour(ended, allowed=(0,)):
        raise RuntimeError(problem)
    moments = [float(line) for line in count.read_text().splitlines()] if count.exists() else []
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    changes = sorted(moment - ended.start for moment in moments)
    return Undisturbed(old, command.parts(out), ended.seconds, changes, max(sizes), sum(sizes))


def difference(found: Parts, wanted: Parts) -> str | None:
    """Which parts differ, if any do."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    shown = [f"{name} is {found.get(name, 'missing')} instead of {wanted.get(name, 'missing')}" for name in names]
    return "; ".join(shown[:3]) if shown else None


def differs(command: Command, folder: Path, wanted: Parts) -> str | None:
    """Which parts of ``out`` in `folder` are not as they shall be, or not whole."""
    try:
        return difference(command.parts(folder / "out"), wanted)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def half(command: Command, folder: Path, usual: Undisturbed) -> str | None:
    """Which parts of ``out`` in `folder` are neither as before nor as they shall be."""
    try:
        parts = command.parts(folder / "out")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = [name for name, value in parts.items() if value not in (usual.old.get(name), usual.new.get(name))]
    found += [name for name in usual.old if name not in parts and name in usual.new]
    return f"neither as before nor as it shall be: {', '.join(found)}" if found else None


def digest(data: bytes) -> str:
    """Short, for messages."""
    return hashlib.sha256(data).hexdigest()[:12]


def files(out: Path) -> Parts:
    """Every file, by its bytes; temporary ones do not count."""
    if out.is_file():
        return {out.name: digest(out.read_bytes())}
    found = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(out).as_posix(): digest(path.read_bytes()) for path in found}


def bundle(out: Path) -> Parts:
    """A bundle as one part: the weights that its config names, and the config."""
    if not (out / "adapter_config.json").is_file():
        return {}
    config = json.loads((out / "adapter_config.json").read_text())
    weights = [out / "adapter_model.safetensors", out / ".adapter_model.safetensors.next"]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights if path.is_file()]
    if config["weights_sha256"] not in hashes:
        raise ValueError(f"the config of the bundle {out} is not of the weights beside it")
    config.pop("metadata")  # seconds and dates
    return {"bundle": digest(json.dumps(config, sort_keys=True).encode())}


def run(out: Path) -> Parts:
    """A run: its bundle, what it measured, and that each checkpoint is whole."""
    for path in out.glob("checkpoints/*.pth"):
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} in {path} is damaged")
    found = bundle(out / "bundle")
    if (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text())
        found["metrics"] = digest(json.dumps(results["metrics"], sort_keys=True).encode())
    return found


def study(out: Path) -> Parts:
    """A transfer study: the accuracy of each cell; none may be there twice, and its bundle is whole."""
    found: Parts = {}
    text = (out / "results.jsonl").read_bytes() if (out / "results.jsonl").is_file() else b""
    for place, line in enumerate(text.split(b"\n")):
        try:
            entry = json.loads(line) if line else {"kind": "nothing"}
        except ValueError:
            continue  # torn: a killed process was at it, and whoever goes on begins a new line
        if entry["kind"] == "cell":
            if entry["status"] != "done":
                raise ValueError(f"a cell failed: {entry.get('reason')}")
            if entry["cell"] in found:
                raise ValueError(f"cell {entry['cell']} is there twice, again on line {place + 1}")
            if "bundle" in entry and not bundle(out / entry["bundle"]):
                raise ValueError(f"the bundle of cell {entry['cell']} is missing")
            found[entry["cell"]] = str(entry["accuracy"])
    return found


def fetched(out: Path) -> Parts:
    """The converted weights in the cache, which must be whole as soon as they have their name."""
    path = out.parent / "home" / "weights" / f"{RELEASE}.safetensors"
    if not path.is_file():
        return {}
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if len(data) != 8 + int.from_bytes(data[:8], "little") + end:
        raise ValueError(f"{path} is cut short")
    return {"tensors": header["__metadata__"]["tensors_sha256"][:12]}


def _copy(source: str) -> Callable[[Path, Path], object]:
    return lambda fixtures, out: shutil.copytree(fixtures / source, out)


def _text(fixtures: Path, out: Path) -> None:
    out.mkdir()
    for name in ("predictions.csv", "model.onnx"):
        (out / name).write_text("what was there before\n")


def _pictures(fixtures: Path) -> str:
    return str(fixtures / "pictures" / "test")


GRID = ("--sweep", "lr=0.1,0.01", "--seeds", "2")


def _vtab(*more: str) -> Callable[[Path], list[str]]:
    return lambda fixtures: [
        *("vtab", "run", "--suite", str(fixtures / "tasks" / "tiny.json"), "--root", str(fixtures / "tasks")),
        *("--backbone", "vit_va_nano_patch4_32", "--adapter", "linear_probe", "vpt", "--out", "out", "--device", "cpu"),
        *(*GRID, "--cfg-options", "schedule.epochs=2", "schedule.warmup_epochs=0", "optimizer.name=adamw", *more),
    ]


TRAIN = Command(
    "train",
    lambda fixtures: ["train", str(fixtures / "recipe.json"), "--work-dir", "out"],
    run,
    go_on=("--resume",),
)
EVAL = Command("eval", lambda fixtures: ["eval", "out", "--json"], files, _copy("run0"))
FETCH = Command("weights fetch", lambda fixtures: ["weights", "fetch", RELEASE], fetched)
PREDICT = Command(
    "predict",
    lambda fixtures: [
        *("predict", _pictures(fixtures), "--bundle", str(fixtures / "run0"), "--format", "csv"),
        *("--output", "out/predictions.csv", "--save-overlay", "out/overlays"),
    ],
    files,
    _text,
)
MASKS = Command(
    "predict masks",
    lambda fixtures: [
        *("predict", str(fixtures / "pairs" / "images" / "test"), "--bundle", str(fixtures / "segmenter")),
        *("--masks", "out"),
    ],
    files,
)
ATTEND = Command(
    "attend",
    lambda fixtures: [
        *("attend", str(fixtures / "pictures" / "test" / "left" / "0.png"), "--bundle", str(fixtures / "run0")),
        *("--out", "out"),
    ],
    files,
)
EXPORT = Command(
    "export",
    lambda fixtures: ["export", str(fixtures / "run0"), "--out", "out/model.onnx"],
    files,
    _text,
)
AVERAGE = Command(
    "bundle average",
    lambda fixtures: [
        *("bundle", "average", str(fixtures / "run0" / "bundle"), str(fixtures / "run1" / "bundle")),
        *("--out", "out"),
    ],
    bundle,
)
STUDY = Command("vtab run", _vtab(), study)
STUDY_2 = Command("vtab run --workers 2", _vtab("--workers", "2"), study)

COMMANDS = (TRAIN, EVAL, FETCH, PREDICT, MASKS, ATTEND, EXPORT, AVERAGE, STUDY, STUDY_2)
