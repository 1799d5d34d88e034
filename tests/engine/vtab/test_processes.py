"""Studies by the command line in several processes: workers, a cluster, and what SIGKILL leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

GRID = ["lr=0.1,0.01,0.001", "weight_decay=0,0.1"]


def _command(tree: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vizattn", "vtab", "run", "--suite", str(tree / "tiny.json"), "--root", str(tree)),
        *("--backbone", "vit_va_nano_patch4_32", "--adapter", "linear_probe", "vpt", "--out", str(out)),
        *("--seeds", "2", "--sweep", *GRID, "--device", "cpu"),
        *("--cfg-options", "schedule.epochs=2", "schedule.warmup_epochs=0", "optimizer.name=adamw"),
        *more,
    ]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _cells(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "cell"]


def _numbers(out: Path) -> dict[str, float]:
    cells = _cells(out)
    assert len(cells) == len({cell["cell"] for cell in cells}) == 2 * 2 * (6 + 2), "every cell once"
    assert all(cell["status"] == "done" for cell in cells)
    assert all((out / cell["bundle"] / "adapter_config.json").is_file() for cell in cells if cell["stage"] == "final")
    return {cell["cell"]: cell["accuracy"] for cell in cells}


@pytest.fixture(scope="module")
def alone(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What one process finds."""
    out = tmp_path_factory.mktemp("alone")
    text = _run(_command(tree, out))
    assert "tiny: test accuracy" in text and (out / "report.html").is_file()
    return _numbers(out)


@pytest.mark.slow
def test_workers_find_what_one_process_finds(tree: Path, tmp_path: Path, alone: dict[str, float]) -> None:
    _run(_command(tree, tmp_path, "--workers", "2"))
    assert _numbers(tmp_path) == alone


@pytest.mark.slow
def test_two_runners_divide_the_work(tree: Path, tmp_path: Path, alone: dict[str, float]) -> None:
    runners = [subprocess.Popen(_command(tree, tmp_path, "--quiet")) for _ in range(2)]
    assert [runner.wait(600) for runner in runners] == [0, 0]
    assert _numbers(tmp_path) == alone


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_anywhere_it_goes_on(tree: Path, tmp_path: Path, alone: dict[str, float], workers: str) -> None:
    moments = random.Random(7)
    for _ in range(6):
        runner = subprocess.Popen(
            _command(tree, tmp_path, "--workers", workers), start_new_session=True, stdout=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(4, 16))
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    _run(_command(tree, tmp_path, "--workers", workers))
    assert _numbers(tmp_path) == alone
    assert not (tmp_path / "running").exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tree: Path, tmp_path: Path, alone: dict[str, float]) -> None:
    runner = subprocess.Popen(_command(tree, tmp_path, "--workers", "2"), stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children")
    killed = 0
    deadline = time.monotonic() + 300
    while killed < 2 and runner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        if (tmp_path / "results.jsonl").exists() and len(_cells(tmp_path)) > 3 * killed:
            workers = [pid for pid in children.read_text().split() if "spawn_main" in _arguments(pid)]
            if workers:
                os.kill(int(workers[-1]), signal.SIGKILL)
                killed += 1
    assert runner.wait(600) == 0 and killed == 2
    assert _numbers(tmp_path) == alone


def _arguments(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs vizattn[ray]")
def test_a_ray_cluster_finds_the_same(tree: Path, tmp_path: Path, alone: dict[str, float]) -> None:
    _run(_command(tree, tmp_path, "--ray", "local"))
    assert _numbers(tmp_path) == alone
