"""SIGKILL at random moments: what was there stays, or the whole new thing is there, and the next call ends as ever."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

from faults.campaign import Case, Trial
from faults.command import Running, misbehaviour, vizattn
from faults.commands import COMMANDS, EVAL, STUDY, STUDY_2, TRAIN, Command, Undisturbed, differs, half, undisturbed

__all__ = ["CASES"]

PATIENCE = 30.0
"""Seconds in which the processes that a killed one leaves must end."""


def _killed(trial: Trial, command: Command, args: list[str], usual: Undisturbed, home: dict[str, str]) -> str:
    """Run `args` until killed at a random moment; gives how it was killed, in words, or what went wrong."""
    how = trial.random.choice(("change", "change", "write", "moment"))
    if not usual.changes or command is STUDY_2 or not usual.largest:
        how = "moment"
    faults = {"FOLDER": str(trial.folder)}
    if how == "change":
        number = trial.random.randint(1, len(usual.changes))
        faults["KILL_AT"], told = str(number), f"before change {number} of {len(usual.changes)}"
    elif how == "write":
        size = max(1, round(usual.largest * trial.random.random() ** 3))  # small files are many
        faults["WRITE"], told = str(size), f"at byte {size} of a file"
    running = Running(args, trial.folder, home, faults=faults, launcher=command.launcher)
    if how == "moment":
        first = usual.changes[0] if usual.changes and command is not EVAL else 0.5 * usual.seconds
        moment = trial.random.uniform(0.9 * first, usual.seconds)
        whole = trial.random.random() < 0.5
        told = f"after {moment:.1f} s{'' if whole else ', it alone'}"
        deadline = time.monotonic() + moment
        while running.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        running.kill(whole)
    ended = running.end()
    if left := running.left(PATIENCE):
        raise _LostError(f"{told}: processes {left} went on for {PATIENCE:.0f} s")
    killed = ended.status in (-signal.SIGKILL, -signal.SIGXFSZ)
    if not killed and (problem := misbehaviour(ended, allowed=(0, 1, 2) if how == "write" else (0,))):
        raise _LostError(f"{told}: {problem}")
    return told if killed else f"{told} (it had ended before)"


_IN_STEPS = (TRAIN, STUDY, STUDY_2)
"""What goes on where it was is killed several times in a row."""


class _LostError(Exception):
    """What was lost, in words."""


def _kill(command: Command) -> Callable[[Trial], Iterator[str | None]]:
    def run(trial: Trial) -> Iterator[str | None]:
        usual = undisturbed(trial.stage, command)
        fixtures, out, home = trial.stage.fixtures, trial.folder / "out", trial.stage.env(trial.folder)
        command.old(fixtures, out)
        args, told = command.args(fixtures), []
        kills = trial.random.choice((1, 1, 2, 3)) if command in _IN_STEPS else 1
        for left in reversed(range(kills)):
            try:
                told.append(_killed(trial, command, args, usual, home))
            except _LostError as error:
                yield str(error)
                return
            args = [*command.args(fixtures), *command.go_on]
            problem = half(command, trial.folder, usual)
            if not left:
                ended = vizattn(args, trial.folder, home, launcher=command.launcher)
                problem = problem or misbehaviour(ended, allowed=(0,)) or differs(command, trial.folder, usual.new)
            yield f"killed {', '.join(told)}: {problem}" if problem else None

    return run


CASES = [Case("kills", command.name, _kill(command)) for command in COMMANDS]
