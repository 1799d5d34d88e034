"""Checkpoints: tensors, numbers, strings, lists and dicts only, so that `torch.load(weights_only=True)` reads them."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vizattn.adapters import adapter_state, attached
from vizattn.errors import VizattnError
from vizattn.files import check_regular, replacing

__all__ = [
    "FORMAT_VERSION",
    "changing",
    "check_same_data",
    "check_same_recipe",
    "checkpoints_in",
    "first_differences",
    "load_model_state",
    "load_newest",
    "model_state",
    "read_checkpoint",
    "save_checkpoint",
]

FORMAT_VERSION = 1

_HEADER = {"model": dict, "config": dict, "class_names": list, "preprocessing": dict}
_TO_RESUME = ("data", "optimizer", "schedulers", "ema", "epoch", "iteration", "best", "fingerprint", "world_size")

RESUMABLE_CHANGES = ("logging", "checkpoint", "data.num_workers", "cache_features")
"""What may change when a run is resumed: none of it changes the weights."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole.

    Raises:
        OSError: The disk is full or read-only; what was at `path` before is unchanged.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # of its archive writer, after an error of the file's own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, safely: nothing but data is accepted.

    Raises:
        OSError: There is no such file, or it may not be read.
        VizattnError: Truncated, not one of ours, or of a newer format.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK" and (damaged := zipfile.ZipFile(file).testzip()):
                # torch writes these checksums and does not look at them
                raise VizattnError(f"{damaged} in it is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch each have their own
        reason = str(error).splitlines() or ["the file is empty" if not path.stat().st_size else type(error).__name__]
        raise VizattnError(f"Cannot read the checkpoint {path}: {reason[0].rstrip('.')}.") from error
    if not isinstance(state, dict) or not isinstance(state.get("format_version"), int):
        raise VizattnError(f"{path} is not a checkpoint of vizattn.")
    if state["format_version"] > FORMAT_VERSION:
        raise VizattnError(
            f"{path} has checkpoint format {state['format_version']}; "
            f"this version of vizattn reads up to {FORMAT_VERSION}."
        )
    wrong = [key for key, kind in _HEADER.items() if not isinstance(state.get(key), kind)]
    if wrong:
        raise VizattnError(f"{path} is not a checkpoint of vizattn, or damaged: {', '.join(wrong)} missing or wrong.")
    return state


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run's `checkpoints` folder, oldest first."""
    return sorted(folder.glob("iter_*.pth"))


def load_newest(folder: Path, logger: logging.Logger) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run's `checkpoints` folder; None when there is none at all.

    Raises:
        VizattnError: There are checkpoints and none can be read.
    """
    failure: VizattnError | None = None
    for path in reversed(checkpoints_in(folder)):
        try:
            state = read_checkpoint(path)
            if missing := [key for key in _TO_RESUME if key not in state]:
                raise VizattnError(f"The checkpoint {path} cannot be resumed: it lacks {', '.join(missing)}.")
            return state
        except VizattnError as error:
            logger.warning("%s Trying the one before it.", error)
            failure = failure or error
    if failure:
        raise failure
    return None


def first_differences(saved: Mapping[str, Any], now: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """Dotted names of the options that differ, with both values."""
    flat_saved, flat_now = _flat(saved), _flat(now)
    names = [name for name in dict.fromkeys([*flat_saved, *flat_now]) if flat_saved.get(name) != flat_now.get(name)]
    return [
        f"{name}: {flat_saved.get(name)!r} in the checkpoint, {flat_now.get(name)!r} now"
        for name in names
        if not any(name == skip or name.startswith(f"{skip}.") for skip in ignore)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [_flat(entry, f"{prefix}.{key}" if prefix else str(key)) for key, entry in value.items()]
        return {name: entry for part in items for name, entry in part.items()}
    return {prefix: value}


def check_same_recipe(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """See that a checkpoint belongs to this run.

    Raises:
        VizattnError: It does not; the message names the first options that differ.
    """
    differences = first_differences(saved, now, RESUMABLE_CHANGES)
    if differences:
        raise VizattnError(
            f"The checkpoint in {where} is of another run: {'; '.join(differences[:3])}"
            f"{f' (and {len(differences) - 3} more)' if len(differences) > 3 else ''}. "
            "Resume with the same recipe and options, or start anew in another --work-dir."
        )


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """See that a run goes on with the data it began with; both have `class_names` and `data`.

    Raises:
        VizattnError: It does not; the message names the first difference.
    """
    before, after = saved["class_names"], now["class_names"]
    changes = [f"class {i} was {a!r} and is {b!r}" for i, (a, b) in enumerate(zip(before, after)) if a != b]
    if len(before) != len(after):
        changes.append(f"there were {len(before)} classes and are {len(after)}")
    if not changes:
        changes = [
            f"{name} was {saved['data'].get(name)} and is {now['data'].get(name)}"
            for name in dict.fromkeys([*now["data"], *saved["data"]])
            if saved["data"].get(name) != now["data"].get(name)
        ]
    if changes:
        raise VizattnError(
            f"The data is no longer that of the checkpoint in {where}: {changes[0]}. "
            "Put the data back as it was, or start anew in another --work-dir."
        )


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: with an adapter its tensors, the head and changed buffers; else everything."""
    # A copy: tensors of a state dict are views of what goes on changing.
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in changing(model).items()}


def changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same, not copied: the model's own tensors."""
    return adapter_state(model) if attached(model) else model.state_dict()


def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor], where: Path) -> None:
    """Load what `model_state` gave.

    Raises:
        VizattnError: The names or shapes are those of another model; the message names the first.
    """
    expected = changing(model)
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise VizattnError(
            f"The weights in {where} are of another model: {'; '.join(problems[:3])}"
            f"{f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''}."
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])
