"""What a person sees of a run: a live bar on a terminal, one line an epoch elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

__all__ = ["Display", "ProgressCallback", "ProgressHook", "display_for", "track"]

Display = Literal["bar", "lines", "quiet"]
ProgressCallback = Callable[[int, int, dict[str, float]], None]
"""Called after each iteration with (iterations done, iterations in all, {"loss", "lr"})."""


def display_for(quiet: bool) -> Display:
    """A bar on a terminal, lines elsewhere, in the main process only."""
    from rich.console import Console

    if quiet or not is_main_process():
        return "quiet"
    return "bar" if Console().is_terminal else "lines"


def _columns() -> list[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]


def track(items: Any, total: int, description: str, display: Display) -> Any:
    """`items`, with a bar over `total` when `display` is ``"bar"``."""
    if display != "bar":
        yield from items
        return
    from rich.progress import Progress

    with Progress(*_columns(), transient=True) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)


class ProgressHook(Hook):
    """Shows the run's progress and calls `callback`."""

    priority = "LOWEST"

    def __init__(
        self, display: Display, callback: ProgressCallback | None = None, metric: tuple[str, str] = ("accuracy",) * 2
    ) -> None:
        self.display = display
        self.metric, self.title = metric
        self.callback = callback
        self.bar: Any = None
        self.task: Any = None
        self.loss = 0.0

    def before_train(self, runner: Any) -> None:
        self.start = time.perf_counter()
        if self.display != "bar":
            return
        from rich.progress import Progress

        self.bar = Progress(*_columns())
        self.bar.start()
        self.task = self.bar.add_task("train", total=runner.max_iters, completed=runner.iter, note="")

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.loss = outputs["loss"].item()
        done = runner.iter + 1
        if self.callback:
            lr = runner.optim_wrapper.optimizer.param_groups[-1]["lr"]
            self.callback(done, runner.max_iters, {"loss": self.loss, "lr": lr})
        if self.bar:
            description = f"epoch {runner.epoch + 1}/{runner.max_epochs}"
            self.bar.update(self.task, completed=done, description=description, note=f"loss {self.loss:.3f}")

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        if self.display == "quiet":
            return
        line = (
            f"epoch {runner.epoch}/{runner.max_epochs}  loss {self.loss:.4f}  "
            f"val {self.title} {metrics[self.metric]:.2%}  {time.perf_counter() - self.start:.1f} s"
        )
        if self.bar:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar:
            self.bar.stop()
            self.bar = None
