"""Runs the command line in processes of their own, and says what none of them may do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TIMEOUT", "Ended", "Running", "descendants", "misbehaviour", "vizattn"]

TIMEOUT = 240.0
"""Seconds after which a command counts as hung; the longest takes some twenty on a quiet machine."""
SHIM = Path(__file__).with_name("shim")


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    """As of subprocess: negative for a signal."""
    output: str
    """Standard output and error."""
    start: float
    """By the monotonic clock."""
    seconds: float
    hung: bool = False


class Running:
    """A `python -m vizattn ...` that was started, in a session of its own."""

    def __init__(
        self,
        args: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        *,
        launcher: Sequence[str] = ("-m", "vizattn"),
        faults: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start it in `folder`.

        Args:
            args: Of the command.
            folder: Where it runs.
            env: Beside the variables of this process.
            launcher: Other words between python and the arguments.
            faults: Variables for the shim, without ``FAULT_``.
            log: The folder for its output, by default the one it runs in.
        """
        self.log = (log or folder) / f".output-{time.monotonic_ns()}"
        asked = {f"FAULT_{name}": value for name, value in (faults or {}).items()}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **env, **asked}
        environment["COLUMNS"] = "200"
        if asked:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIM), environment.get("PYTHONPATH")]))

        self.start = time.monotonic()
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *args],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, whole: bool = True) -> None:
        """SIGKILL to it, and with `whole` to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            if whole:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def end(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end; what takes longer is killed and counts as hung."""
        try:
            status, hung = self.process.wait(timeout), False
        except subprocess.TimeoutExpired:
            self.kill()
            status, hung = self.process.wait(), True
        output = self.log.read_text(errors="replace")
        self.log.unlink()
        return Ended(status, output, self.start, time.monotonic() - self.start, hung)

    def left(self, patience: float) -> list[int]:
        """Processes of its session that are still there `patience` seconds after its end; they are killed then."""
        deadline = time.monotonic() + patience
        while (found := [*_session(self.process.pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.kill()
        return found


def _session(leader: int) -> Iterator[int]:
    """Living processes of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] not in "ZX":
                yield int(stat.parent.name)


def descendants(pid: int) -> list[int]:
    """All processes below one, the nearest first."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def vizattn(args: Sequence[str], folder: Path, env: Mapping[str, str], **how: object) -> Ended:
    """Run ``vizattn ARGS`` in `folder` to its end; `how` as for `Running`."""
    return Running(args, folder, env, **how).end()  # type: ignore[arg-type]


def misbehaviour(ended: Ended, allowed: Sequence[int] = (0, 1, 2)) -> str | None:
    """What no command may do, whatever the fault: hang, show a traceback, be killed, end in another status."""
    tail = ended.output.strip()[-600:]
    if ended.hung:
        return f"hung for {ended.seconds:.0f} s: {tail}"
    if "Traceback (most recent call last)" in ended.output:
        return f"a traceback: {ended.output[ended.output.index('Traceback') :].strip()[-1500:]}"
    if ended.status not in allowed:
        return f"ended with status {ended.status} instead of {' or '.join(map(str, allowed))}: {tail}"
    if ended.status and not tail:
        return f"ended with status {ended.status} and no message"
    return None
