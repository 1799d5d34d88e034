"""wandb and tensorboard through mmengine's visualizer; neither ever stops a training run."""

from __future__ import annotations

import netrc
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

__all__ = ["visualizer_config", "wandb_mode"]


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


def visualizer_config(logging: Mapping[str, Any], name: str) -> dict[str, Any]:
    """mmengine's visualizer with the backends that were asked for."""
    backends: list[dict[str, Any]] = []
    if logging["wandb"]:
        init = {"project": "vizattn", "name": name, "mode": wandb_mode()}
        backends.append({"type": "WandbVisBackend", "init_kwargs": init})
    if logging["tensorboard"]:
        backends.append({"type": "TensorboardVisBackend"})
    return {"type": "Visualizer", "vis_backends": backends}
