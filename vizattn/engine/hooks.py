"""Hooks: randomness of an iteration, the guard against a diverged loss, checkpoints, metrics as JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from vizattn.engine.checkpoint import checkpoints_in, model_state, save_checkpoint
from vizattn.engine.runner import take_from_main_process
from vizattn.engine.seeding import seed_from
from vizattn.errors import VizattnError
from vizattn.files import read_json_lines, write_text

__all__ = ["CheckpointHook", "JsonLinesHook", "LossGuardHook", "SeedHook"]


class SeedHook(Hook):
    """Turns the loader to its place in the run, and seeds each iteration (mixup, dropout, drop path).

    Args:
        seed: The run's.
        length: Iterations of a whole epoch.
    """

    priority = "VERY_HIGH"

    def __init__(self, seed: int, length: int) -> None:
        self.seed = seed
        self.length = length

    def before_train_epoch(self, runner: Any) -> None:
        loader = runner.train_dataloader
        loader.sampler.set_epoch(runner.epoch)
        loader.sampler.skip((runner.iter - runner.epoch * self.length) * loader.batch_size)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_from(self.seed, 2, runner.iter, runner.rank)


class LossGuardHook(Hook):
    """Stops when the loss is no longer a number, before anything is saved."""

    priority = "HIGH"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            raise VizattnError(f"The loss became {loss} at {_place(runner)}. {last_good(self.folder)}")


def _place(runner: Any) -> str:
    return f"iteration {runner.iter + 1} of {runner.max_iters} (epoch {runner.epoch + 1})"


def last_good(folder: Path) -> str:
    """What a user can do after training diverged."""
    kept = checkpoints_in(folder)
    what = "Start again with a lower optimizer.lr, a longer schedule.warmup_epochs or optimizer.clip_grad=1.0"
    if not kept:
        return f"{what}. No checkpoint had been written yet."
    return f"{what} (--resume takes no changes). The last good checkpoint can be used: vizattn eval {kept[-1]}"


class CheckpointHook(Hook):
    """Saves a checkpoint at epoch ends, after validation (and every so many iterations when asked), and the best one.

    Args:
        folder: Where they go: ``iter_00000123.pth`` after that many iterations, and ``best.pth``.
        header: What each checkpoint carries beside the state: recipe, class names, preprocessing, versions.
        interval_epochs: Epochs between checkpoints; the last epoch always has one.
        interval_iters: Iterations between checkpoints within an epoch, moved on to the next optimizer step.
        keep: How many to keep beside the best.
        metric: The validation metric that says which is the best; the higher the better.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        *,
        interval_epochs: int = 1,
        interval_iters: int | None = None,
        keep: int = 2,
        ema: Any = None,
        metric: str = "accuracy",
    ) -> None:
        self.folder = folder
        self.header = header
        self.metric = metric
        self.interval_epochs = interval_epochs
        self.interval_iters = interval_iters
        self.keep = keep
        self.ema = ema
        self.best: dict[str, float] = {}
        self.due = False

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.interval_iters:
            return
        done = runner.iter + 1
        self.due = self.due or done % self.interval_iters == 0
        epoch_ends = done % runner.optim_wrapper.length == 0
        if self.due and not epoch_ends and runner.optim_wrapper.steps_after(runner.iter):
            self._agree(runner)
            self.save(runner, runner.epoch, done)

    def after_train_epoch(self, runner: Any) -> None:
        self._agree(runner)
        if not _validates(runner):
            self._epoch_end(runner, runner.epoch + 1)

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        better = not self.best or metrics[self.metric] > self.best[self.metric]
        if better:
            self.best = {self.metric: metrics[self.metric], "epoch": runner.epoch}
            if is_main_process():
                state = {**self.header, "model": self._model_state(runner, averaged=True), "best": self.best}
                self._check_finite(runner, state["model"])
                save_checkpoint(self.folder / "best.pth", state)
        self._epoch_end(runner, runner.epoch)

    def _agree(self, runner: Any) -> None:
        """One model in all processes before it is measured or saved: running statistics differ, as do the images."""
        take_from_main_process(runner.task.model.buffers())
        if self.ema is not None:
            take_from_main_process(self.ema.averages.values())

    def _epoch_end(self, runner: Any, epoch: int) -> None:
        if self.due or epoch % self.interval_epochs == 0 or epoch == runner.max_epochs:
            self.save(runner, epoch, runner.iter)

    def _model_state(self, runner: Any, averaged: bool) -> dict[str, torch.Tensor]:
        if averaged and self.ema is not None:
            self.ema.swap()
        try:
            return model_state(runner.task.model)
        finally:
            if averaged and self.ema is not None:
                self.ema.swap()

    def _check_finite(self, runner: Any, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise VizattnError(
                    f"The weights {name} are no longer finite after iteration {runner.iter} (epoch {runner.epoch}). "
                    f"{last_good(self.folder)}"
                )

    def save(self, runner: Any, epoch: int, iteration: int) -> None:
        """Write the checkpoint for `epoch` whole epochs and `iteration` iterations done, and drop the oldest."""
        self.due = False
        if not is_main_process():
            return
        state = {
            **self.header,
            "model": self._model_state(runner, averaged=False),
            "optimizer": runner.optim_wrapper.optimizer.state_dict(),
            "schedulers": [_plain(scheduler.state_dict()) for scheduler in runner.param_schedulers or []],
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "epoch": epoch,
            "iteration": iteration,
            "best": self.best,
        }
        self._check_finite(runner, state["model"])
        save_checkpoint(self.folder / f"iter_{iteration:08d}.pth", state)
        for old in checkpoints_in(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)

    def restore_state(self, runner: Any, state: dict[str, Any]) -> None:
        self.best = dict(state["best"])


def _validates(runner: Any) -> bool:
    """Whether the epoch that ends now is measured, see mmengine's EpochBasedTrainLoop."""
    done = runner.epoch + 1
    return runner.val_loop is not None and (done % runner.train_loop.val_interval == 0 or done == runner.max_epochs)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if isinstance(value, bool | int | float | str | list | None)}


class JsonLinesHook(Hook):
    """Appends ``{"iteration", "epoch", "loss", "lr", "seconds"}`` and ``{"epoch", "val": {...}}`` lines to a file."""

    priority = "LOW"

    def __init__(self, path: Path, interval: int) -> None:
        self.path = path
        self.interval = interval

    def before_train(self, runner: Any) -> None:
        if not is_main_process():
            return
        kept = []
        if runner.iter and self.path.exists():
            # Lines written after the checkpoint that is resumed from will be written again.
            for line in read_json_lines(self.path):
                if isinstance(line.get("iteration"), int) and line["iteration"] <= runner.iter:
                    kept.append(json.dumps(line))
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if (runner.iter + 1) % self.interval:
            return
        self._append(
            {
                "iteration": runner.iter + 1,
                "epoch": runner.epoch + 1,
                "loss": outputs["loss"].item(),
                "lr": runner.optim_wrapper.optimizer.param_groups[-1]["lr"],
                "seconds": runner.message_hub.get_scalar("train/time").current(),
            }
        )

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        values = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
        self._append({"iteration": runner.iter, "epoch": runner.epoch, "val": values})

    def _append(self, line: dict[str, Any]) -> None:
        if is_main_process():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
