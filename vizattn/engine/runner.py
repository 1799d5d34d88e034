"""mmengine's Runner, with what its stable release lacks: CPU processes, safe resume, quiet logging, no leftovers."""

from __future__ import annotations

import logging
import os
import signal
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from vizattn.engine.checkpoint import load_model_state
from vizattn.engine.task import ClassificationTask
from vizattn.errors import VizattnError

__all__ = ["TaskRunner", "distributed", "is_main_process", "rank_and_world", "take_from_main_process"]

_PATIENCE = timedelta(hours=24)  # the others wait while the main process computes features of a whole data set


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this process prints and writes files; true after the group of processes is gone, by torchrun's number."""
    return int(os.environ.get("RANK", 0)) == 0


def take_from_main_process(tensors: Iterable[torch.Tensor]) -> None:
    """Give `tensors` the main process's values in all processes."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


@contextmanager
def distributed(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did: nccl on CUDA, gloo elsewhere.

    mmengine would set a CUDA device even for gloo, so the group is made here, before the Runner.

    Raises:
        VizattnError: Another process died, one of these or one that loads images.
    """
    launched = "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized()
    if launched:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if told := _death_of_another(error):
            with suppress(ValueError):  # torch's handler would raise once more when further loaders end
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise VizattnError(told) from error
        raise
    finally:
        if launched:
            torch.distributed.destroy_process_group()


def _death_of_another(error: Exception) -> str | None:
    """What to say of an error that only the end of another process makes; None of others."""
    text = str(error)
    # A process that ends while it hands over a batch shows as a lost connection or socket.
    lost = not isinstance(error, RuntimeError) and any(
        frame.f_globals.get("__name__", "").startswith("multiprocessing.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if lost or "DataLoader worker" in text:
        return (
            f"A process that loads images ended, perhaps for want of memory: {text.strip().rstrip('.')}. Try again, a "
            "training with --resume; if it happens again with a lower data.num_workers."
        )
    if torch.distributed.is_initialized() and (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        return (
            f"Another process of this run ended, or cannot be reached: {text.partition(chr(10))[0]} Its own output "
            "says why; start all of them again, a training with --resume."
        )
    return None


class TaskRunner(Runner):
    """A Runner for built objects: a task, loaders, an optimizer wrapper and schedulers.

    Args:
        task: What is trained or tested.
        work_dir: Where logs go.
        device: Where to compute.
        log_file: The text log, appended to.
        name: Begins the experiment's name.
        recipe: Shown by wandb and tensorboard.
        state: A checkpoint to resume from.
        kwargs: The Runner's own arguments.
    """

    _has_loaded: bool

    def __init__(
        self,
        task: ClassificationTask,
        work_dir: Path,
        *,
        device: torch.device,
        log_file: Path,
        name: str,
        recipe: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.task = task
        self.device = device
        self.log_file = log_file
        self.state = state
        _, world = rank_and_world()
        super().__init__(
            task,
            str(work_dir),
            launcher="pytorch" if world > 1 else "none",
            experiment_name=f"{name}_{uuid.uuid4().hex[:8]}",
            cfg=Config({"recipe": dict(recipe)} if recipe else {}),
            **kwargs,
        )

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """mmengine asks compilers for their versions, 1.6 s a run; ours are in `results.json`."""

    def dump_config(self) -> None:
        """The recipe is written by whoever resolved it."""

    def get_hooks_info(self) -> str:
        """One line for the log instead of a page."""
        return ", ".join(type(hook).__name__ for hook in self.hooks)

    def _init_model_weights(self) -> None:
        """timm models have an `init_weights` of their own that would wipe pretrained weights."""

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(log_level, str(self.log_file), **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                # A full disk must stop the run with a message, not fill the terminal with tracebacks.
                handler.handleError = _reraise  # type: ignore[method-assign]
            else:
                handler.setLevel(logging.ERROR)  # the file has the rest
        return logger

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        if not self.distributed or self._train_dataloader is None:
            return model
        device_ids = [self.device.index or 0] if self.device.type == "cuda" else None
        return MMDistributedDataParallel(module=model, device_ids=device_ids, broadcast_buffers=False)

    def load_or_resume(self) -> None:
        if self.state is None or self._has_loaded:
            return
        state = self.state
        load_model_state(self.task.model, state["model"], Path(self.work_dir))
        self.optim_wrapper.optimizer.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(self.param_schedulers or [], state["schedulers"]):
            scheduler.load_state_dict(saved)
        self.call_hook("restore_state", state=state)
        self.train_loop._epoch, self.train_loop._iter = state["epoch"], state["iteration"]
        self._has_loaded = True

    def close(self) -> None:
        """Give back what mmengine keeps by name for the whole process: several runs in one process do not add up."""
        with suppress(Exception):
            self.visualizer.close()
        for handler in list(self.logger.handlers):
            handler.close()
            self.logger.removeHandler(handler)
        for kind in (MMLogger, MessageHub, Visualizer, DefaultScope):
            kind._instance_dict.pop(self.experiment_name, None)
        for folder in (Path(self.log_dir, "vis_data"), Path(self.log_dir)):
            with suppress(OSError):
                folder.rmdir()  # only when nothing was written there


def _reraise(record: logging.LogRecord) -> None:
    raise
