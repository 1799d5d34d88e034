"""Distributed training on two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rows import DENSE, METHODS


def test_two_processes():
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    dense = sum(row in ("vit_va", "swin") for _, row in DENSE)
    assert done.stdout.count("ok ") == 4 * len(METHODS) - 3 - 4 + dense and dense == 2 * len(METHODS) - 3
