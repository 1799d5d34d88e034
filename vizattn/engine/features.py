"""Frozen features on disk: computed once, memory-mapped, and equal bit for bit to computing them in every epoch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vizattn.engine.progress import Display, track
from vizattn.engine.task import frozen_features_each
from vizattn.files import read_json, replacing, sha256_of, write_text

__all__ = ["FeatureDataset", "cache_folder", "cached_features", "feature_key"]

_STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """Where features are kept: ``$VIZATTN_HOME/features``, by default ``~/.cache/vizattn/features``."""
    return Path(os.environ.get("VIZATTN_HOME") or Path.home() / ".cache" / "vizattn") / "features"


class FeatureDataset(Dataset):
    """Items (features (...), label) read from a memory-mapped file."""

    def __init__(self, path: Path, labels: list[int]) -> None:
        self.path = path
        self.labels = labels
        self.features = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.features[index])), self.labels[index]


def feature_key(model: nn.Module, dataset: Any, *, level: str, transform: str, amp: bool, model_args: Any) -> str:
    """A hash of everything a feature depends on: images, transform, frozen weights, architecture, arithmetic."""
    import PIL
    import timm
    import torchvision

    from vizattn.adapters import fingerprint
    from vizattn.attention import native
    from vizattn.version import __version__

    device = next(model.parameters()).device
    parts = {
        "format": 2,
        "frozen weights": fingerprint(model),
        "model": model_args,
        "level": level,
        "data": dataset.identity,
        "transform": transform,
        "amp": amp,
        # Rounding differs between devices and instruction sets.
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "library": native.library is not None,
        "versions": [__version__, torch.__version__, torchvision.__version__, timm.__version__, PIL.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cached_features(
    model: nn.Module,
    dataset: Dataset,
    key: str,
    *,
    amp: bool,
    batch_size: int,
    num_workers: int,
    folder: Path,
    description: str,
    display: Display,
    logger: logging.Logger,
) -> FeatureDataset:
    """The features of `dataset`, from disk when they are there and whole, else computed and stored.

    Safe under interruption and with several processes: a file appears whole, under a name that says its content;
    two that compute the same features write the same bytes. The JSON beside it is written last and holds the
    checksum: what does not fit it is computed again.
    """
    data, note = folder / f"{key}.npy", folder / f"{key}.json"
    found = _open(data, note, logger)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    labels: list[int] = []
    with replacing(data) as temporary:
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
        size = len(dataset)  # type: ignore[arg-type]
        _write(temporary, _features(model, track(loader, len(loader), description, display), amp, labels), size)
        digest = sha256_of(temporary)
    write_text(note, json.dumps({"sha256": digest, "labels": labels, "labels_sha256": _digest(labels)}))
    return FeatureDataset(data, labels)


def _features(model: nn.Module, batches: Any, amp: bool, labels: list[int]) -> Iterator[np.ndarray]:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    for images, batch_labels in batches:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            features = frozen_features_each(model, images.to(device))
        labels += batch_labels.tolist()
        yield features.cpu().numpy()
    model.train(training)


def _write(path: Path, batches: Iterator[np.ndarray], size: int) -> None:
    """One .npy of all batches, piece by piece: a full disk is an OSError here, and a SIGBUS through a memory map."""
    with open(path, "wb") as file:
        rows = 0
        for batch in batches:
            if not rows:
                header = {"descr": np.lib.format.dtype_to_descr(batch.dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (size, *batch.shape[1:])})
            file.write(np.ascontiguousarray(batch).tobytes())
            rows += len(batch)


def _digest(labels: list[int]) -> str:
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()


def _open(data: Path, note: Path, logger: logging.Logger) -> FeatureDataset | None:
    if not (data.exists() and note.exists()):
        return None
    try:
        saved = read_json(note)
        if (saved["sha256"], saved["labels_sha256"]) == (sha256_of(data), _digest(saved["labels"])):
            return FeatureDataset(data, saved["labels"])
        logger.warning("The cached features %s do not fit their checksum: computing them again.", data)
    except (ValueError, KeyError, TypeError, OSError) as error:
        logger.warning("The cached features %s cannot be read (%s): computing them again.", data, error)
    return None


def _remove_stale(folder: Path) -> None:
    """Temporary files of processes that were killed; younger ones may still be written to."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
