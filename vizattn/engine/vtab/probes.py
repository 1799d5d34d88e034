"""The cells of a probe on frozen features: one pass of the backbone a task, all settings and seeds from that."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import vizattn
from vizattn.adapters import cache_level
from vizattn.data import transform_identity
from vizattn.data.transfer import get_suite, open_split
from vizattn.engine.build import choose_device, make_loader
from vizattn.engine.evaluate import export
from vizattn.engine.features import cache_folder, cached_features, feature_key
from vizattn.engine.kinds import kind_of
from vizattn.engine.models import build_model, model_preprocessing
from vizattn.engine.seeding import seed_from
from vizattn.engine.task import frozen_features_each
from vizattn.engine.vtab.frozen import Params, can_batch, inputs_of, put, right_answers, train_probes
from vizattn.engine.vtab.plan import Cell, Study, Unit
from vizattn.errors import VizattnError
from vizattn.memory import PeakMemory

__all__ = ["run_probes"]

_BATCH = 64
_BYTES_AT_ONCE = 1 << 28
"""Of the parameters that are trained side by side."""


@dataclass
class _Trained:
    """Cells trained side by side: `params` of the first of them is setting 0, and so on."""

    cells: list[Cell]
    model: nn.Module
    params: Params


def run_probes(study: Study, unit: Unit, staging: Path) -> list[tuple[Cell, dict[str, Any] | Exception]] | None:
    """Every cell with what came out; None where only the engine's loop does what the recipe asks for.

    The test split is opened after the last final cell is trained, and its images go through the backbone once.
    """
    first, device = unit.cells[0], choose_device(study.device)
    suite = get_suite(study.suite)
    splits: dict[str, Any] = {
        split: open_split(suite, unit.task, split, root=study.root) for split in ("train", "val", "trainval")
    }
    class_names = splits["train"].class_names
    model = _fresh_model(first, len(class_names), device)
    if not can_batch(model, first.config):
        return None
    memory = PeakMemory(device)
    preprocessing = model_preprocessing(model, first.config)
    transform = kind_of(first.config).build_transform(preprocessing, first.config["data"], False)

    clock = time.perf_counter()
    for dataset in splits.values():
        dataset.transform = transform
    features = _Features(model, splits, first.config, study.cached)
    pass_seconds = time.perf_counter() - clock

    clock = time.perf_counter()
    which = "train" if first.stage == "select" else "trainval"
    groups = [group for cells in _by_seed(unit.cells) for group in _train(model, cells, splits, which, features)]
    if first.stage == "select":
        measured = "val"
        batches: Iterator[Tensor] = features.batches("val")
    else:
        measured = "test"
        splits["test"] = open_split(suite, unit.task, "test", root=study.root, transform=transform)
        batches = _pass(model, splits["test"], first.config, device)
    samples = len(splits[measured])
    right = _count(groups, batches, torch.tensor(splits[measured].labels, device=device))
    common = {
        "samples": samples,
        "params": asdict(vizattn.trainable_summary(model)),
        "seconds": round((time.perf_counter() - clock) / len(unit.cells), 3),
        "pass_seconds": round(pass_seconds, 3),
        "peak_memory_mb": round(memory.megabytes(), 1),
        "preprocessing": preprocessing,
    }
    outcomes: list[tuple[Cell, dict[str, Any] | Exception]] = []
    for group, counts in zip(groups, right):
        for place, cell in enumerate(group.cells):
            if counts[place] < 0:
                error = VizattnError("Training diverged: its parameters are no longer numbers.")
                outcomes.append((cell, error))
                continue
            found: dict[str, Any] = {**common, "accuracy": counts[place] / samples, "model": group.model}
            if cell.stage == "final":
                put(group.model, group.params, place)
                found["exported"] = staging / cell.key
                metrics = {"test": {"accuracy": found["accuracy"]}}
                export(group.model, found["exported"], cell.config, class_names, preprocessing, metrics)
            outcomes.append((cell, found))
    return outcomes


def _fresh_model(cell: Cell, num_classes: int, device: torch.device) -> nn.Module:
    """The model of a cell before training, begun from its seed as in the engine's loop."""
    seed_from(cell.seed, 3)
    return build_model(cell.config, num_classes).to(device).eval()


def _by_seed(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.seed, []).append(cell)
    return [*groups.values()]


def _train(
    model: nn.Module, cells: list[Cell], splits: Mapping[str, Any], which: str, features: _Features
) -> Iterator[_Trained]:
    """Cells of one seed, side by side as far as memory allows."""
    num_classes = len(splits[which].class_names)
    device = next(model.parameters()).device
    own = _fresh_model(cells[0], num_classes, device)
    size = sum(p.numel() * p.element_size() for p in own.parameters() if p.requires_grad)
    at_once = max(1, _BYTES_AT_ONCE // max(size, 1))
    labels = torch.tensor(splits[which].labels, device=device)
    for begin in range(0, len(cells), at_once):
        part = cells[begin : begin + at_once]
        rates = [(cell.config["optimizer"]["lr"], cell.config["optimizer"]["weight_decay"]) for cell in part]
        params = train_probes(
            own, part[0].config, rates, len(labels), lambda indices: features.of(which, indices), labels
        )
        yield _Trained(part, own, params)


def _count(groups: Sequence[_Trained], batches: Iterator[Tensor], labels: Tensor) -> list[list[int]]:
    """How many samples each cell gets right, -1 where it diverged; `batches` are gone through once."""
    right = [[0] * len(group.cells) for group in groups]
    place = 0
    for batch in batches:
        target = labels[place : place + len(batch)]
        place += len(batch)
        for counts, group in zip(right, groups):
            for i, more in enumerate(right_answers(group.params, inputs_of(group.model, batch), target)):
                counts[i] = counts[i] + more if more >= 0 else -1
    return right


def _pass(model: nn.Module, dataset: Any, config: Mapping[str, Any], device: torch.device) -> Iterator[Tensor]:
    """Frozen features of a split, batch by batch, kept nowhere."""
    for images, _ in make_loader(dataset, config, device, train=False):
        with torch.no_grad():
            yield frozen_features_each(model, images.to(device))


class _Unique(Dataset):
    """The different images of several splits, in the order of their digests."""

    def __init__(self, splits: Mapping[str, Any]) -> None:
        places: dict[str, tuple[Any, int]] = {}
        digests: dict[str, list[str]] = {}
        for name, dataset in splits.items():
            digests[name] = [dataset.digest(i) for i in range(len(dataset))]
            for i, digest in enumerate(digests[name]):
                places.setdefault(digest, (dataset, i))
        order = {digest: row for row, digest in enumerate(sorted(places))}
        self.rows = {name: torch.tensor([order[digest] for digest in own]) for name, own in digests.items()}
        self.items = [places[digest] for digest in order]
        self.identity = hashlib.sha256("".join(order).encode()).hexdigest()
        self.transform = next(iter(splits.values())).transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        dataset, place = self.items[index]
        return dataset[place]


class _Features:
    """Frozen features of the splits for training: from one pass, of each different image once, or from images."""

    def __init__(self, model: nn.Module, splits: Mapping[str, Any], config: Mapping[str, Any], cached: bool) -> None:
        self.model, self.splits = model, splits
        self.device = next(model.parameters()).device
        if not cached:
            self.stored: Any = None
            return
        unique = _Unique(splits)
        key = feature_key(
            model,
            unique,
            level=str(cache_level(model)),
            transform=transform_identity(unique.transform),
            amp=False,
            model_args=[config["model"], config["adapter"]],
        )
        self.rows = unique.rows
        self.stored = cached_features(
            model,
            unique,
            key,
            amp=False,
            batch_size=_BATCH,
            num_workers=config["data"]["num_workers"],
            folder=cache_folder(),
            description="features",
            display="quiet",
            logger=logging.getLogger("vizattn"),
        ).features

    def of(self, split: str, indices: Tensor) -> Tensor:
        """What the trained part reads of these samples."""
        if self.stored is None:
            images = torch.stack([self.splits[split][int(index)][0] for index in indices])
            features = frozen_features_each(self.model, images.to(self.device))
        else:
            features = torch.from_numpy(self.stored[self.rows[split][indices].numpy()]).to(self.device)
        return inputs_of(self.model, features)

    def batches(self, split: str) -> Iterator[Tensor]:
        """Features of a whole split in its order."""
        for indices in torch.arange(len(self.splits[split])).split(_BATCH):
            if self.stored is None:
                images = torch.stack([self.splits[split][int(index)][0] for index in indices])
                yield frozen_features_each(self.model, images.to(self.device))
            else:
                yield torch.from_numpy(self.stored[self.rows[split][indices].numpy()]).to(self.device)
