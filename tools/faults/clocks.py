"""Clocks that jump, and files from the future: results do not depend on the time of day."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.campaign import Case, Trial
from faults.command import Running, misbehaviour, vizattn
from faults.commands import FETCH, STUDY, TRAIN, Command, differs, undisturbed

__all__ = ["CASES"]


def _clock(trial: Trial) -> dict[str, str]:
    return {"CLOCK": str(trial.random.randrange(1 << 30))}


def _touch(folder: Path, trial: Trial) -> None:
    """Give each file another time, some years from now or before."""
    for path in folder.rglob("*"):
        moment = time.time() + trial.random.choice((-1, 1)) * trial.random.choice((5.0, 1e5, 3e8))
        os.utime(path, (moment, moment))


def _jumping(command: Command) -> Callable[[Trial], Iterator[str | None]]:
    """The clock jumps while the command runs, it is killed, files get other times, and it goes on by another clock."""

    def run(trial: Trial) -> Iterator[str | None]:
        usual, env = undisturbed(trial.stage, command), trial.stage.env(trial.folder)
        args = command.args(trial.stage.fixtures)
        running = Running(args, trial.folder, env, faults=_clock(trial), launcher=command.launcher)
        first = usual.changes[0] if usual.changes else 0.0
        moment = running.start + trial.random.uniform(first, usual.seconds)
        while running.process.poll() is None and time.monotonic() < moment:
            time.sleep(0.05)
        running.kill()
        running.end()
        _touch(trial.folder, trial)
        ended = vizattn([*args, *command.go_on], trial.folder, env, faults=_clock(trial), launcher=command.launcher)
        problem = misbehaviour(ended, allowed=(0,)) or differs(command, trial.folder, usual.new)
        yield f"killed after {moment - running.start:.1f} s: {problem}" if problem else None

    return run


def _retry(trial: Trial) -> Iterator[str | None]:
    """A cell that failed while the clock was ahead is computed again when it is right."""
    usual, env = undisturbed(trial.stage, STUDY), trial.stage.env(trial.folder)
    args = STUDY.args(trial.stage.fixtures)
    ended = vizattn(args, trial.folder, env)
    if problem := misbehaviour(ended, allowed=(0,)):
        yield problem
        return
    path = trial.folder / "out" / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    finals = [line for line in lines if line.get("stage") == "final"]
    spoilt = trial.random.choice(finals)
    failed = {key: value for key, value in spoilt.items() if key not in ("crc", "accuracy", "bundle", "run")}
    ahead = time.time() + trial.random.choice((-3e8, 60.0, 1e5, 3e8))
    failed |= {"status": "failed", "reason": "the clock was ahead", "time": round(ahead, 3)}
    kept = [line if line is not spoilt else failed for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    ended = vizattn([*args, "--retry-failed"], trial.folder, env)
    text = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in text if json.loads(line).get("reason") != failed["reason"]))
    problem = misbehaviour(ended, allowed=(0,)) or differs(STUDY, trial.folder, usual.new)
    yield f"a failure {ahead - time.time():.0f} s ahead: {problem}" if problem else None


CASES = [
    *(Case("clocks", command.name, _jumping(command)) for command in (TRAIN, STUDY, FETCH)),
    Case("clocks", "vtab run --retry-failed", _retry),
]
