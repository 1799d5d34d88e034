"""Trains each of the given runs in a process of its own, which kills itself with SIGKILL at the given moment.

The moment is an iteration, or the writing of the n-th checkpoint: just before it gets its name.
Usage: python killed_runs.py RUNS.json, a list of {"config", "work_dir", "iteration" or "checkpoint"}.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from vizattn import files
from vizattn.engine import train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(run: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    replace, written = os.replace, []

    def replace_or_die(source: Path, target: Path) -> None:
        if Path(target).name.startswith("iter_"):
            written.append(target)
            if len(written) == run.get("checkpoint"):
                die()
        replace(source, target)

    files.os.replace = replace_or_die
    train(
        run["config"],
        work_dir=run["work_dir"],
        quiet=True,
        progress=lambda done, total, values: die() if done == run.get("iteration") else None,
    )


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if not child:
            try:
                train_until_killed(each)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"was not killed: {each}")
