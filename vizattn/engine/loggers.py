"""wandb and tensorboard through mmengine's visualizer; neither ever stops a training run."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.visualization.vis_backend import TensorboardVisBackend, WandbVisBackend

from vizattn.errors import VizattnError

__all__ = ["WandbBackend", "visualizer_config", "wandb_mode"]


def wandb_mode() -> str:
    """``online`` only when there is a key and the server can be reached; what the user set stands."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    host = "api.wandb.ai"
    known = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        known = known or netrc.netrc().authenticators(host) is not None
    if not known:
        return "offline"
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


class WandbBackend(WandbVisBackend):
    """mmengine's backend, but it does not upload every Python file below the current folder, and never stops a run."""

    def _init_env(self) -> None:
        try:
            super()._init_env()
        except Exception:  # a refused key, a server that went away: anything but a reason to stop training
            self._init_kwargs["mode"] = "offline"
            super()._init_env()

    def add_config(self, config: Config, **kwargs: Any) -> None:
        self.experiment.config.update(config.to_dict(), allow_val_change=True)


def visualizer_config(logging: Mapping[str, Any], work_dir: Path) -> dict[str, Any]:
    """mmengine's visualizer with the backends that were asked for, which write to `work_dir`."""
    backends: list[Any] = []
    if logging["wandb"]:
        mode = wandb_mode()
        init = {"project": "vizattn", "name": work_dir.name, "mode": mode, "settings": {"silent": mode == "offline"}}
        backends.append(WandbBackend(str(work_dir), init))
    if logging["tensorboard"]:
        if importlib.util.find_spec("tensorboard") is None:
            raise VizattnError("logging.tensorboard needs tensorboard: pip install 'vizattn[tensorboard]'")
        backends.append(TensorboardVisBackend(str(work_dir / "tensorboard")))
    return {"type": "Visualizer", "vis_backends": backends}
