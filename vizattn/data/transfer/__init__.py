"""Transfer tasks: VTAB-1k, FGVC, VTAB-mini, and a user's own, all opened in the same way."""

from vizattn.data.transfer.checking import TaskFindings, check, render
from vizattn.data.transfer.datasets import (
    Availability,
    DrawnSplit,
    FileSplit,
    available,
    open_split,
    open_stage,
    stage_splits,
)
from vizattn.data.transfer.preparing import prepare
from vizattn.data.transfer.suites import SUITES, get_suite
from vizattn.data.transfer.tasks import Suite, TransferTask, select_tasks

__all__ = [
    "SUITES",
    "Availability",
    "DrawnSplit",
    "FileSplit",
    "Suite",
    "TaskFindings",
    "TransferTask",
    "available",
    "check",
    "get_suite",
    "open_split",
    "open_stage",
    "prepare",
    "render",
    "select_tasks",
    "stage_splits",
]
