"""In every Python process of a case, by PYTHONPATH: dies or lets the clock jump at the moment that FAULT_* says.

FAULT_FOLDER: the folder whose files matter.
FAULT_COUNT: a file that gets a line for each change of them, the time: any opening to write, renaming or removing.
FAULT_KILL_AT: the number of the change before which the process kills itself.
FAULT_WRITE: by this many bytes in one file the process is killed in the middle of writing it.
FAULT_SIZE: no file may be larger, which is an error as on a full disk.
FAULT_MEMORY: bytes of address space for the process.
FAULT_CLOCK: a seed; by it time.time() jumps by years, days and seconds, to and fro.
"""

import os
import random
import signal
import sys
import time
from time import monotonic

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(folder: str, count: str | None, kill_at: int | None) -> None:
    seen = 0

    def on_event(event: str, args: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = args
            if not flags & _WRITING:
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path = args[0]
        else:
            return
        if isinstance(path, int) or path == count or not os.path.abspath(os.fsdecode(path)).startswith(folder):
            return
        seen += 1
        if count:
            descriptor = os.open(count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, f"{monotonic()}\n".encode())
            os.close(descriptor)
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def _jump(seed: int) -> None:
    real, moments, offset = time.time, random.Random(seed), 0.0

    def jumping() -> float:
        nonlocal offset
        if moments.random() < 0.2:
            offset = moments.choice((-1, 1)) * moments.choice((0.0, 2.5, 3600.0, 86400.0, 10 * 365 * 86400.0))
        return real() + offset

    time.time = jumping


if "FAULT_FOLDER" in os.environ:
    _kill_at = os.environ.get("FAULT_KILL_AT")
    _watch(os.environ["FAULT_FOLDER"], os.environ.get("FAULT_COUNT"), int(_kill_at) if _kill_at else None)
if "FAULT_WRITE" in os.environ:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ignored by Python: it would be an error instead of the end
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FAULT_WRITE"]),) * 2)
if "FAULT_SIZE" in os.environ:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FAULT_SIZE"]),) * 2)
if "FAULT_MEMORY" in os.environ:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (int(os.environ["FAULT_MEMORY"]),) * 2)
if "FAULT_CLOCK" in os.environ:
    _jump(int(os.environ["FAULT_CLOCK"]))
