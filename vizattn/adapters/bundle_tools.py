"""Bundles looked at, compared and averaged, without their backbone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vizattn.adapters.base import METHODS
from vizattn.adapters.bundle import CONFIG_NAME, WEIGHTS_NAME, full_name, read_bundle, read_weights, write_bundle
from vizattn.errors import VizattnError
from vizattn.version import __version__

__all__ = ["average_bundles", "bundle_summary", "compare_bundles"]

Folder = str | os.PathLike[str]

#: What bundles must have in common to be averaged.
_ONE_MODEL = ("backbone", "adapters", "segmenter", "num_classes", "class_names", "preprocessing", "fingerprint")
_HEADS = dict.fromkeys(("head", "head_dist", "fc", "classifier"), "heads")  # what timm calls them


def bundle_summary(folder: Folder) -> dict[str, Any]:
    """What a bundle is, and whether it is whole; plain values.

    Returns:
        folder, task, backbone, backbone_args, adapters (method, options, merges: True or why not), parameters (how
        many numbers there are for "adapters", "heads" and "the backbone"), kilobytes, num_classes, class_names,
        preprocessing, metadata, vizattn_version, and checks: (what, whether it holds, what is wrong).

    Raises:
        VizattnError: as `read_bundle`.
    """
    folder = Path(folder)
    config = read_bundle(folder)
    checks: list[tuple[str, bool, str]] = []
    state: dict[str, Tensor] = {}
    try:
        state = read_weights(folder, config)
        checks.append(("checksum", True, ""))
    except VizattnError as error:
        checks.append(("checksum", False, str(error)))
    odd = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    checks.append(("numbers are finite", not odd, f"not in {', '.join(odd[:3])}" if odd else ""))
    name = config["backbone"]["name"]
    known = timm.is_model(name)
    checks.append(("backbone is known", known, "" if known else f"timm and vizattn know no {name!r}"))
    interrupted = not (folder / WEIGHTS_NAME).is_file()
    checks.append(("saved to the end", not interrupted, "it can be read; load and save it again" * interrupted))
    parameters = {"adapters": 0, "heads": 0, "the backbone": 0}
    for key, tensor in state.items():
        kind = {"adapters": "adapters", "heads": "heads", **_HEADS}.get(key.partition(".")[0], "the backbone")
        parameters[kind] += tensor.numel() if tensor.is_floating_point() else 0
    return {
        "folder": str(folder),
        "task": "segmentation" if config["segmenter"] else "classification" if config["num_classes"] else "features",
        "backbone": full_name(config["backbone"]),
        "backbone_args": config["backbone"]["args"],
        "adapters": [{**a, "merges": METHODS[a["method"]].mergeable} for a in config["adapters"]],
        "segmenter": config["segmenter"],
        "parameters": parameters,
        "kilobytes": round(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1000, 1),
        "num_classes": config["num_classes"],
        "class_names": config["class_names"],
        "preprocessing": config["preprocessing"],
        "metadata": config["metadata"],
        "vizattn_version": config.get("vizattn_version"),
        "checks": checks,
    }


def compare_bundles(first: Folder, second: Folder) -> dict[str, list[dict[str, Any]]]:
    """What differs between two bundles.

    Returns:
        config: option (dotted), first and second; tensors: name, and either shapes (first, second; None where it is
        missing) or the largest difference of an entry and the norm of the difference relative to that of the first.

    Raises:
        VizattnError: as `read_bundle`, or weights that are damaged.
    """
    configs = [read_bundle(folder) for folder in (first, second)]
    states = [read_weights(Path(folder), config) for folder, config in zip((first, second), configs)]
    for config in configs:
        del config["weights_sha256"]  # the tensors say more
    options = [{"option": name, "first": a, "second": b} for name, a, b in _differences(configs[0], configs[1])]
    tensors: list[dict[str, Any]] = []
    for name in sorted({*states[0], *states[1]}):
        a, b = (state.get(name) for state in states)
        if a is None or b is None or a.shape != b.shape:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (a, b)]
            tensors.append({"tensor": name, "shapes": shapes})
        elif not torch.equal(a, b):
            change, size = b.double() - a.double(), a.double().norm().item()
            relative = change.norm().item() / size if size else None
            tensors.append({"tensor": name, "largest": change.abs().max().item(), "relative": relative})
    return {"config": options, "tensors": tensors}


def average_bundles(folders: Sequence[Folder], target: Folder, shares: Sequence[float] | None = None) -> Path:
    """Write the weighted average of bundles of one model: a soup, arXiv:2203.05482.

    Moving statistics are averaged like weights, which is not what the averaged model would see; counts are the largest.

    Args:
        folders: Two bundles or more, of the same backbone, methods, options and classes.
        target: The new bundle's folder; there must be none in it.
        shares: Of each, positive; they need not sum to one. By default equal.

    Returns:
        The folder.

    Raises:
        VizattnError: too few bundles, shares that are none, bundles that differ in more than what they learnt, or a
            bundle in `target`.
    """
    if len(folders) < 2:
        raise VizattnError("An average needs at least two bundles.")
    shares = [1.0] * len(folders) if shares is None else list(shares)
    if len(shares) != len(folders) or not all(0 < share < float("inf") for share in shares):
        raise VizattnError(f"{len(folders)} bundles need as many shares above 0, not {', '.join(map(str, shares))}.")
    shares = [share / sum(shares) for share in shares]
    target = Path(target)
    if (target / CONFIG_NAME).exists():
        raise VizattnError(f"There is a bundle in {target} already: name another folder.")
    configs = [read_bundle(folder) for folder in folders]
    of_one = [{key: config[key] for key in _ONE_MODEL} for config in configs]
    for folder, what in zip(folders[1:], of_one[1:]):
        for name, a, b in _differences(of_one[0], what):
            raise VizattnError(
                f"Bundles of one backbone, method and head can be averaged: {name} is {_short(a)} in {folders[0]} and "
                f"{_short(b)} in {folder}."
            )
    states = [read_weights(Path(folder), config) for folder, config in zip(folders, configs)]
    averaged = {}
    for name, like in states[0].items():
        tensors = [_tensor(state, name, like, folder) for state, folder in zip(states, folders)]
        averaged[name] = _average(name, tensors, shares)
    for state, folder in zip(states, folders):
        for name in state.keys() - states[0].keys():
            raise VizattnError(f"{folder} has a tensor {name} that {folders[0]} lacks.")
    from_first = {key: configs[0]["metadata"][key] for key in ("config", "palette") if key in configs[0]["metadata"]}
    origins = [
        {"bundle": _known_as(Path(folder)), "weights_sha256": config["weights_sha256"], "share": share}
        for folder, config, share in zip(folders, configs, shares)
    ]
    config = configs[0] | {"vizattn_version": __version__, "metadata": from_first | {"average_of": origins}}
    return write_bundle(target, config, averaged)


def _known_as(folder: Path) -> str:
    """The name of a bundle; of one in the work directory of a run, where all are called the same, the run's."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] == "bundle" else parts[-1]


def _tensor(state: Mapping[str, Tensor], name: str, like: Tensor, folder: Folder) -> Tensor:
    tensor = state.get(name)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}, {tensor.dtype}"
        raise VizattnError(
            f"{folder} should have a tensor {name} of {tuple(like.shape)}, {like.dtype}; it has {found}."
        )
    return tensor


def _average(name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    like = tensors[0]
    if like.is_floating_point():
        return sum((t.double() * share for t, share in zip(tensors, shares)), torch.zeros(()).double()).to(like.dtype)
    if name.endswith("num_batches_tracked"):
        return torch.stack(list(tensors)).amax(0)
    if not all(torch.equal(tensor, like) for tensor in tensors):
        raise VizattnError(f"The bundles cannot be averaged: {name} differs, which holds places and not weights.")
    return like


def _differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in `a`, value in `b`) of what differs; None where there is nothing."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for place, (one, other) in enumerate(zip(a, b)):
            yield from _differences(one, other, f"{name}.{place}")
    elif a != b:
        yield name, a, b


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
