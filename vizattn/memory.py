"""The memory of a run, as the operating system counts it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["PeakMemory", "resident_megabytes"]


class PeakMemory:
    """Counts from its creation on: device memory on CUDA, else the resident memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # Linux only; elsewhere the peak is that of the whole process
                Path("/proc/self/clear_refs").write_text("5")

    def megabytes(self) -> float:
        """Peak so far, in units of 2^20 bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return _status("VmHWM") or _peak_of_process()


def resident_megabytes() -> float:
    """Resident memory of this process now, in units of 2^20 bytes; outside Linux its peak so far."""
    return _status("VmRSS") or _peak_of_process()


def _status(entry: str) -> float | None:
    """An entry of Linux's table of this process."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) / 1024
    return None


def _peak_of_process() -> float:
    import resource  # not on Windows
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
