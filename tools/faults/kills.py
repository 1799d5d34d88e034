"""SIGKILL at random moments: what was there stays, or the whole new thing is there, and the next call ends as ever."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from faults.campaign import Case, Trial
from faults.command import Running, misbehaviour, vizattn
from faults.commands import COMMANDS, EVAL, STUDY, STUDY_2, TRAIN, Command, Undisturbed, differs, half, undisturbed

__all__ = ["CASES"]

PATIENCE = 30.0
"""Seconds in which the processes that a killed one leaves must end."""


def _kill_once(trial: Trial, command: Command, args: list[str], usual: Undisturbed) -> str:
    """Run `args` until killed at a random moment; gives how it was killed, in words.

    Raises:
        _EndedError: It ended before.
        _LostError: Something was lost.
    """
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
    running = Running(args, trial.folder, trial.stage.env(trial.folder), faults=faults, launcher=command.launcher)
    if how == "moment":
        first = usual.changes[0] if usual.changes and command is not EVAL else 0.5 * usual.seconds
        moment = trial.random.uniform(0.9 * first, usual.seconds) * trial.hurry
        whole = trial.random.random() < 0.5
        told = f"after {moment:.1f} s{'' if whole else ', it alone'}"
        while running.process.poll() is None and time.monotonic() < running.start + moment:
            time.sleep(0.01)
        running.kill(whole)
    ended = running.end()
    if left := running.left(PATIENCE):
        raise _LostError(f"{told}: processes {left} went on for {PATIENCE:.0f} s")
    if ended.status in (-signal.SIGKILL, -signal.SIGXFSZ):
        return told
    # A process of its own may have met the end instead, which the command must tell.
    if problem := misbehaviour(ended, allowed=(0, 1, 2) if how == "write" else (0,)):
        raise _LostError(f"{told}: {problem}")
    raise _EndedError


_IN_STEPS = (TRAIN, STUDY, STUDY_2)
"""What goes on where it was is killed several times in a row."""


class _EndedError(Exception):
    """The command ended before it was killed."""


class _LostError(Exception):
    """What was lost, in words."""


def _kill(command: Command) -> Callable[[Trial], Iterator[str | None]]:
    def run(trial: Trial) -> Iterator[str | None]:
        wanted = trial.random.choice((1, 1, 2, 3)) if command in _IN_STEPS else 1
        for number in range(8):
            folder = trial.folder / str(number)
            folder.mkdir()
            told, problem = _kill_often(replace(trial, folder=folder, attempt=number), command, wanted)
            if told or problem:
                yield f"killed {', '.join(told)}: {problem}" if problem else None
                yield from [None] * (len(told) - 1)
                return
        yield "it always ended before it was killed"

    return run


def _kill_often(trial: Trial, command: Command, wanted: int) -> tuple[list[str], str | None]:
    """Kill so many times, each time going on, and then let it end; gives the moments and what was lost."""
    usual, fixtures = undisturbed(trial.stage, command), trial.stage.fixtures
    command.old(fixtures, trial.folder / "out")
    told: list[str] = []
    args = command.args(fixtures)
    try:
        for _ in range(wanted):
            told.append(_kill_once(trial, command, args, usual))
            if problem := half(command, trial.folder, usual):
                return told, problem
            args = [*command.args(fixtures), *command.go_on]
    except _LostError as error:
        return told, str(error)
    except _EndedError:
        if not told:
            return [], differs(command, trial.folder, usual.new)
    ended = vizattn(args, trial.folder, trial.stage.env(trial.folder), launcher=command.launcher)
    return told, misbehaviour(ended, allowed=(0,)) or differs(command, trial.folder, usual.new)


CASES = [Case("kills", command.name, _kill(command)) for command in COMMANDS]
