"""What all cases of a campaign share: the fixtures, a server of weights, and results of undisturbed commands."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.fixtures import RELEASE
from faults.server import Server

__all__ = ["Stage"]


class Stage:
    """A context; everything is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = Server()
        self._lock = threading.Lock()
        self._made: dict[str, tuple[threading.Lock, list[Any]]] = {}

    def __enter__(self) -> Stage:
        self.folder.mkdir(parents=True)
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made by the first who asks; others wait for it."""
        with self._lock:
            lock, made = self._made.setdefault(name, (threading.Lock(), []))
        with lock:
            if not made:
                try:
                    made.append(make())
                except Exception as error:
                    made.append(error)
            if isinstance(made[0], Exception):
                raise RuntimeError(f"{name} cannot be made: {made[0]}") from None
            return made[0]

    @property
    def fixtures(self) -> Path:
        """The folder of `faults.fixtures`."""
        return self.once("fixtures", self._make_fixtures)

    def _make_fixtures(self) -> Path:
        place = self.folder / "fixtures"
        place.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "faults.fixtures", str(place)],
            env=self.env(place),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        self.server.files = {f"{RELEASE}.pth": (place / "published" / f"{RELEASE}.pth").read_bytes()}
        place.chmod(0o755)
        return place

    def env(self, home: Path) -> dict[str, str]:
        """Variables of a command: nothing of this machine's caches, no hub, weights from our server."""
        return {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
            "VIZATTN_HOME": str(home / "home"),
            "VIZATTN_MIRROR": self.server.url,
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "MPLCONFIGDIR": str(self.folder / "matplotlib"),
            "OMP_NUM_THREADS": "1",
        }
