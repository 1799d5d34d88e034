"""Train a model from a recipe: `train`."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from torch import nn

import vizattn
from vizattn.data import is_deterministic, transform_identity
from vizattn.engine.build import Data, build_data, choose_device, make_loader, set_transforms
from vizattn.engine.checkpoint import check_same_data, check_same_recipe, checkpoints_in, load_newest
from vizattn.engine.config import apply_overrides, dump_config, resolve_config
from vizattn.engine.ema import EmaHook
from vizattn.engine.evaluate import export, measure
from vizattn.engine.features import cache_folder, cached_features, feature_key
from vizattn.engine.hooks import CheckpointHook, JsonLinesHook, LossGuardHook, SeedHook
from vizattn.engine.kinds import kind_of
from vizattn.engine.loggers import visualizer_config
from vizattn.engine.models import model_preprocessing
from vizattn.engine.optim import EpochOptimWrapper, build_optimizer, build_schedule
from vizattn.engine.pictures import OverlayHook
from vizattn.engine.progress import ProgressCallback, ProgressHook, display_for
from vizattn.engine.recipes import load_recipe, recipe_name
from vizattn.engine.run_report import Measured
from vizattn.engine.runner import TaskRunner, distributed, rank_and_world
from vizattn.engine.seeding import seed_from
from vizattn.engine.task import Source
from vizattn.errors import VizattnError
from vizattn.files import explain_disk_errors, no_empty_folder, prepare_folder, write_text
from vizattn.memory import PeakMemory

__all__ = ["Result", "train", "versions"]


@dataclass
class Result:
    """What a run gave; all but the model is in `results.json`."""

    work_dir: str
    metrics: dict[str, dict[str, Any]]
    """By split ("val", and "test" if the data has it), in 0..1: accuracy, accuracy_top5, loss; or miou, macc, aacc.

    Also "samples", and accuracy or IoU by class.
    """
    best: dict[str, float]
    """The best validation accuracy or mIoU while training, and its epoch."""
    params: dict[str, int]
    """Trainable "with_head" and "without_head", and "total"."""
    seconds: float
    peak_memory_mb: float
    exported: str
    """The folder of the bundle, or of the model when no adapter is attached."""
    main_process: bool
    """Under torchrun: whether this is the process that wrote the files."""
    seed: int
    class_names: list[str]
    preprocessing: dict[str, Any]
    versions: dict[str, str]
    command: str
    config: dict[str, Any] = field(repr=False)
    model: nn.Module = field(repr=False)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import mmengine
    import timm
    import torchvision

    from vizattn.attention import native
    from vizattn.version import __version__

    return {
        "vizattn": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "mmengine": mmengine.__version__,
        "attention on a CPU": "torch" if native.library is None else "compiled library",
        "platform": platform.platform(),
    }


def train(
    config: Mapping[str, Any] | str | Path,
    *,
    work_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str | None = None,
    quiet: bool = False,
    progress: ProgressCallback | None = None,
    report: bool = True,
) -> Result:
    """Train, evaluate and export a model.

    Args:
        config: A recipe: a dict, a path, or the name of a packaged one.
        work_dir: Where everything goes; by default ``work_dirs/<recipe>``.
        overrides: Dotted options to set on top of the recipe, as in ``{"optimizer.lr": 1e-3}``.
        resume: Go on from the newest whole checkpoint in `work_dir`; the end is that of the uninterrupted run.
        device: By default CUDA when there is one.
        quiet: Print nothing.
        progress: Called after each iteration.
        report: Write ``report.html`` at the end.

    Raises:
        VizattnError: A mistake in the recipe or the data, a checkpoint of another run, a disk that cannot be written,
            or a loss that is no longer a number.
    """
    named = not isinstance(config, Mapping)
    recipe = load_recipe(config) if named else dict(config)  # type: ignore[arg-type]
    resolved = resolve_config(apply_overrides(recipe, overrides or {}))
    folder = Path(work_dir or Path("work_dirs") / (recipe_name(config) if named else "run"))  # type: ignore[arg-type]
    chosen = choose_device(device)
    settled = _Determinism(resolved["deterministic"])
    with explain_disk_errors(folder), distributed(chosen), settled, no_empty_folder(folder):
        return _Run(resolved, folder, chosen, resume, quiet, progress, report).run()


def _describe(data: Data) -> dict[str, Any]:
    """What a resumed run must find again: which images come in which order, before the first epoch."""
    described: dict[str, Any] = {"number of training images": len(data.splits["train"])}
    for split in ("train", "val"):
        if split in data.splits:
            described[f"identity of {split}"] = data.splits[split].identity
    return described


def _check_enough_classes(config: Mapping[str, Any], class_names: list[str]) -> None:
    """See that there is something to tell apart."""
    root = config["data"]["root"]
    if len(class_names) < 2:
        raise VizattnError(f"Training needs at least two classes, but {root} has {len(class_names)}: {class_names}.")
    if config["task"] == "classification" and "images" in class_names and {*class_names} <= _OF_PAIRS:
        raise VizattnError(
            f"{root} holds images and masks ({', '.join(class_names)}), not a folder a class: train it by a recipe "
            "of segmentation, see: vizattn list --recipes segmentation"
        )


_OF_PAIRS = {"images", "masks", "annotations", "labels"}


class _Determinism:
    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        if self.on:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)


class _Run:
    """One call of `train`, in the order things happen."""

    def __init__(
        self,
        config: dict[str, Any],
        work_dir: Path,
        device: torch.device,
        resume: bool,
        quiet: bool,
        progress: ProgressCallback | None,
        report: bool,
    ) -> None:
        self.config, self.work_dir, self.device, self.resume = config, work_dir, device, resume
        self.kind = kind_of(config)
        self.rank, self.world = rank_and_world()
        self.display = display_for(quiet)
        self.progress, self.report = progress, report
        self.checkpoints = work_dir / "checkpoints"
        self.logger = logging.getLogger("vizattn")

    def run(self) -> Result:
        start, memory = time.perf_counter(), PeakMemory(self.device)
        config = self.config
        if self.rank == 0:
            prepare_folder(self.work_dir)
        data = build_data(config["data"])
        class_names = data.class_names
        _check_enough_classes(config, class_names)
        seed_from(config["seed"], 3)  # the new head and the adapters begin from the seed
        model = self.kind.build_model(config, len(class_names)).to(self.device)
        preprocessing = model_preprocessing(model, config)
        set_transforms(data, preprocessing, config)
        params = asdict(vizattn.trainable_summary(model))
        header: dict[str, Any] = {
            "format_version": 1,
            "config": config,
            "class_names": class_names,
            "data": _describe(data),
            "preprocessing": preprocessing,
            "palette": getattr(data.splits["train"], "palette", None),
            "versions": versions(),
            "fingerprint": self._fingerprint(model),
            "world_size": self.world,
        }
        state = self._state_to_resume(header)
        self._make_room()
        best = self._fit(model, data, header, state)
        record = self.kind.record() if self.report and self.kind.record else None
        measured = [split for split in ("val", "test") if split in data.splits]
        metrics: dict[str, dict[str, Any]] = {}
        for split in measured:
            also = [record] if record and split == measured[-1] else []
            metrics[split] = measure(model, data.splits[split], config, self.device, class_names, also)
        result = Result(
            work_dir=str(self.work_dir),
            metrics=metrics,
            best=best,
            params=params,
            seconds=round(time.perf_counter() - start, 3),
            peak_memory_mb=round(memory.megabytes(), 1),
            exported=str(self.work_dir / ("bundle" if config["adapter"] else "model")),
            main_process=self.rank == 0,
            seed=config["seed"],
            class_names=class_names,
            preprocessing=preprocessing,
            versions=header["versions"],
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            config=config,
            model=model,
        )
        if self.rank == 0:
            palette = header["palette"]
            export(model, Path(result.exported), config, class_names, preprocessing, metrics, palette)
            summary = {key: value for key, value in vars(result).items() if key not in ("model", "main_process")}
            write_text(self.work_dir / "results.json", json.dumps(summary, indent=2) + "\n")
            if self.report and measured:
                split = measured[-1]
                task = self.kind.build_task(model, config, len(class_names), "images").eval()
                looked_at = Measured(split, data.splits[split], task, palette, record)
                self.kind.report(self.work_dir / "report.html", result, looked_at)
        return result

    def _make_room(self) -> None:
        """Without `resume`, set checkpoints of an earlier run aside; clear what a killed process left."""
        if self.rank == 0:
            if not self.resume:
                for name in ("results.json", "report.html"):
                    (self.work_dir / name).unlink(missing_ok=True)
                if checkpoints_in(self.checkpoints):
                    aside = self.work_dir / "checkpoints.previous"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(self.checkpoints, aside)
                    self._say(f"Starting anew (--resume would go on): earlier checkpoints are now in {aside}.")
            self.checkpoints.mkdir(exist_ok=True)
            for stale in self.checkpoints.glob(".*.tmp"):
                stale.unlink(missing_ok=True)
            dump_config(self.config, self.work_dir / "config.json")
        self._wait()

    def _say(self, text: str) -> None:
        if self.display != "quiet":
            print(text, flush=True)

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def _state_to_resume(self, header: dict[str, Any]) -> dict[str, Any] | None:
        if not self.resume:
            return None
        state = load_newest(self.checkpoints, self.logger)
        if state is not None:
            check_same_recipe(
                {**state["config"], "processes": state["world_size"]},
                {**self.config, "processes": self.world},
                self.checkpoints,
            )
            check_same_data(state, header, self.checkpoints)
        self._say(f"Going on after iteration {state['iteration']}." if state else "No checkpoint yet: starting anew.")
        return state

    def _fingerprint(self, model: nn.Module) -> str | None:
        if not self.config["adapter"]:
            return None
        from vizattn.adapters import fingerprint

        return fingerprint(model)

    def _fit(
        self, model: nn.Module, data: Data, header: dict[str, Any], state: dict[str, Any] | None
    ) -> dict[str, float]:
        config, seed = self.config, self.config["seed"]
        if state is not None and state["fingerprint"] != header["fingerprint"]:
            raise VizattnError(
                f"The checkpoint in {self.checkpoints} was trained on other frozen weights of "
                f"{config['model']['name']}: it cannot be resumed with these."
            )
        source, train_set, val_set = self._inputs(model, data)
        workers = 0 if source == "features" else config["data"]["num_workers"]
        loader = make_loader(train_set, config, self.device, train=True, num_workers=workers)
        length = len(loader)

        optim, schedule, checkpoint = (config[key] for key in ("optimizer", "schedule", "checkpoint"))
        of_wrapper = ("accumulate", "clip_grad")
        optimizer = build_optimizer(model, **{key: value for key, value in optim.items() if key not in of_wrapper})
        wrapper = EpochOptimWrapper(optimizer, optim["accumulate"], optim["clip_grad"], length)
        schedulers = build_schedule(optimizer, lr=optim["lr"], length=length, **schedule)
        task = self.kind.build_task(model, config, len(data.class_names), source)
        if config["compile"]:
            model.compile()

        ema = EmaHook(model, config["ema"]["decay"]) if config["ema"] else None
        saver = CheckpointHook(self.checkpoints, header, **checkpoint, ema=ema, metric=self.kind.best)
        shown = ProgressHook(self.display, self.progress, (self.kind.best, self.kind.title))
        hooks = [
            SeedHook(seed, length),
            LossGuardHook(self.checkpoints),
            JsonLinesHook(self.work_dir / "metrics.jsonl", min(config["logging"]["interval"], length)),
            saver,
            shown,
            *([ema] if ema else []),
            *self._overlays(data),
        ]
        validation: dict[str, Any] = {}
        if val_set is not None:
            validation = {
                "val_dataloader": make_loader(val_set, config, self.device, train=False, num_workers=workers),
                "val_cfg": {},
                "val_evaluator": Evaluator(self.kind.build_metric(data.class_names)),
            }
        runner = TaskRunner(
            task,
            self.work_dir,
            device=self.device,
            log_file=self.work_dir / "train.log",
            name=self.work_dir.name,
            recipe=config,
            state=state,
            train_dataloader=loader,
            train_cfg={
                "by_epoch": True,
                "max_epochs": schedule["epochs"],
                "val_interval": config["validation"]["interval_epochs"],
            },
            optim_wrapper=wrapper,
            param_scheduler=schedulers,
            default_hooks={
                "logger": {"type": "LoggerHook", "interval": config["logging"]["interval"]},
                "checkpoint": None,
                "sampler_seed": None,  # SeedHook does it
            },
            custom_hooks=hooks,
            randomness={"seed": seed},
            visualizer=visualizer_config(config["logging"], self.work_dir),
            **validation,
        )
        try:
            wrapper.message_hub = runner.message_hub
            with warnings.catch_warnings():
                # With accumulation the schedule steps before the first optimizer step, and should.
                warnings.filterwarnings("ignore", message="Detected call of `scheduler.step")
                runner.train()
        finally:
            shown.close()
            runner.close()
        if ema:
            ema.swap()
        return saver.best

    def _overlays(self, data: Data) -> list[OverlayHook]:
        """Sample masks for wandb and tensorboard, where these were asked for."""
        logs = self.config["logging"]
        shown: Any = data.splits.get("val")
        if not hasattr(shown, "palette") or not (logs["wandb"] or logs["tensorboard"]):
            return []
        return [OverlayHook(shown, shown.palette)]

    def _inputs(self, model: nn.Module, data: Data) -> tuple[Source, Any, Any]:
        """What the loaders give: images, or stored frozen features where that is exactly the same training."""
        config, train_set, val_set = self.config, data.splits["train"], data.splits.get("val")
        level = None
        if config["task"] != "classification":
            return "images", train_set, val_set
        if config["adapter"]:
            from vizattn.adapters import cache_level

            level = cache_level(model)
        mixed = config["loss"]["mixup"] or config["loss"]["cutmix"]
        fixed = is_deterministic(train_set.transform) and not hasattr(train_set, "set_epoch")
        if level is None or mixed or not fixed:
            return "images", train_set, val_set
        if config["cache_features"] is False:
            return "split", train_set, val_set
        amp = config["amp"] == "bf16"
        stored: list[Any] = []
        for split, dataset in (("train", train_set), ("val", val_set)):
            if dataset is None:
                stored.append(None)
                continue
            key = feature_key(
                model,
                dataset,
                level=level,
                transform=transform_identity(dataset.transform),
                amp=amp,
                model_args=[config["model"], config["adapter"]],
            )
            load = {
                "amp": amp,
                "batch_size": config["data"]["batch_size"],
                "num_workers": config["data"]["num_workers"],
                "folder": cache_folder(),
                "description": f"features of {split}",
                "display": self.display,
                "logger": self.logger,
            }
            if self.rank != 0:
                self._wait()  # for the main process to store them
            with explain_disk_errors(cache_folder(), "set VIZATTN_HOME to another folder, or cache_features=False"):
                stored.append(cached_features(model, dataset, key, **load))
            if self.rank == 0:
                self._wait()
        return "features", stored[0], stored[1]
