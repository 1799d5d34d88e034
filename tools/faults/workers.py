"""Processes that die beside others: loaders, workers of a study, one of two that train together, for want of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from faults.campaign import Case, Trial
from faults.command import Ended, Running, descendants, misbehaviour, vizattn
from faults.commands import STUDY_2, TRAIN, Command, differs, run, undisturbed

__all__ = ["CASES"]

PATIENCE = 60.0
"""Seconds in which those that are left must have ended or gone on."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vizattn")

LOADING = Command(
    "train with loaders",
    lambda fixtures: [*TRAIN.args(fixtures), "--cfg-options", "data.num_workers=2"],
    run,
    go_on=("--resume",),
)
TOGETHER = Command("train in two processes", TRAIN.args, run, go_on=("--resume",), launcher=TORCHRUN)


def _started(command: Command, trial: Trial) -> Running:
    args, env = command.args(trial.stage.fixtures), trial.stage.env(trial.folder)
    return Running(args, trial.folder, env, launcher=command.launcher)


def _at_work(running: Running, command: Command, trial: Trial) -> None:
    """Wait for a random moment of the time in which the command writes."""
    usual, out = undisturbed(trial.stage, command), trial.folder / "out"
    while running.process.poll() is None and not (out.is_dir() and any(out.iterdir())):
        time.sleep(0.02)
    moment = time.monotonic() + trial.random.uniform(0, 0.7 * (usual.changes[-1] - usual.changes[0])) * trial.hurry
    while running.process.poll() is None and time.monotonic() < moment:
        time.sleep(0.02)


def _arguments(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _kill_one(running: Running, trial: Trial, words: str = "") -> int:
    """SIGKILL to one of the processes below, of those with `words` in their arguments, as soon as there is one."""
    while running.process.poll() is None:
        found = [pid for pid in descendants(running.process.pid) if words in _arguments(pid)]
        if found:
            with contextlib.suppress(ProcessLookupError):
                victim = trial.random.choice(found)
                os.kill(victim, signal.SIGKILL)
                return victim
        time.sleep(0.01)
    raise _NobodyThereError


class _NobodyThereError(Exception):
    """The command ended before any process could be killed."""


def _again(attempt: Callable[[Trial], str | None]) -> Callable[[Trial], Iterator[str | None]]:
    """`attempt`, in folders of its own until there was a process to kill."""

    def run(trial: Trial) -> Iterator[str | None]:
        for number in range(5):
            folder = trial.folder / str(number)
            folder.mkdir()
            with contextlib.suppress(_NobodyThereError):
                yield attempt(replace(trial, folder=folder, attempt=number))
                return
        yield "there was never a process to kill"

    return run


def _goes_on(trial: Trial, command: Command, told: str, problem: str | None, ended: Ended) -> str | None:
    """What is wrong with a run, or when it is resumed, if anything is."""
    usual, env = undisturbed(trial.stage, command), trial.stage.env(trial.folder)
    if not problem and ended.status:
        args = [*command.args(trial.stage.fixtures), *command.go_on]
        again = vizattn(args, trial.folder, env, launcher=command.launcher)
        problem = misbehaviour(again, allowed=(0,))
    problem = problem or differs(command, trial.folder, usual.new)
    return f"{told}: {problem}" if problem else None


def _loader(trial: Trial) -> str | None:
    """A process that loads images is killed: the run says so, and can be resumed."""
    running = _started(LOADING, trial)
    _at_work(running, LOADING, trial)
    try:
        victim = _kill_one(running, trial)
    finally:
        ended = running.end()
    return _goes_on(trial, LOADING, f"loader {victim} killed", misbehaviour(ended), ended)


def _without_parent(trial: Trial) -> str | None:
    """The run is killed, and its loaders must not stay."""
    running = _started(LOADING, trial)
    _at_work(running, LOADING, trial)
    while running.process.poll() is None and not descendants(running.process.pid):
        time.sleep(0.01)
    running.kill(whole=False)
    ended = running.end()
    if not ended.status:
        raise _NobodyThereError
    left = running.left(PATIENCE)
    problem = f"loaders {left} stayed for {PATIENCE:.0f} s" if left else None
    return _goes_on(trial, LOADING, "killed alone", problem, ended)


def _study_worker(trial: Trial) -> str | None:
    """Workers of a study are killed one after the other; others take their place."""
    args, env = STUDY_2.args(trial.stage.fixtures), trial.stage.env(trial.folder)
    running = _started(STUDY_2, trial)
    victims = []
    try:
        for _ in range(trial.random.choice((1, 2))):
            _at_work(running, STUDY_2, trial)
            victims.append(_kill_one(running, trial, "spawn_main"))
    except _NobodyThereError:
        if not victims:
            raise
    finally:
        ended = running.end()
    problem = misbehaviour(ended, allowed=(0, 1))
    if not problem and ended.status:  # a unit at which two processes died is given up, and computed again on request
        problem = misbehaviour(vizattn([*args, "--retry-failed"], trial.folder, env), allowed=(0,))
    elif not problem:
        problem = differs(STUDY_2, trial.folder, undisturbed(trial.stage, STUDY_2).new)
    return f"workers {victims} killed: {problem}" if problem else None


def _too_large(trial: Trial) -> Iterator[str | None]:
    """One setting of a sweep needs more memory than there is: its cell fails and says why, the others are computed."""
    fixtures, env = trial.stage.fixtures, trial.stage.env(trial.folder)
    number = trial.random.choice((300_000_000, 3_000_000_000))
    workers = ["--workers", "2"] if trial.random.random() < 0.5 else []
    args = [
        *("vtab", "run", "--suite", str(fixtures / "tasks" / "tiny.json"), "--root", str(fixtures / "tasks")),
        *("--backbone", "vit_va_nano_patch4_32", "--adapter", "vpt", "--out", "out", "--device", "cpu", "--seeds", "1"),
        *("--sweep", f"adapter.num_tokens=1,{number}", *workers),
        *("--cfg-options", "schedule.epochs=1", "schedule.warmup_epochs=0", "optimizer.name=adamw"),
    ]
    ended = vizattn(args, trial.folder, env, faults={"MEMORY": str(12 << 30)})
    problem = misbehaviour(ended, allowed=(0,))
    if not problem:
        lines = (trial.folder / "out" / "results.jsonl").read_text().splitlines()
        failed = [line for line in lines if '"status": "failed"' in line]
        done = [line for line in lines if '"status": "done"' in line]
        if (len(failed), len(done)) != (2, 4):
            problem = f"{len(failed)} cells failed and {len(done)} are done, instead of 2 and 4"
        elif not all("memory" in line.lower() for line in failed):
            problem = f"the reason is not the memory: {failed[0][-300:]}"
    yield f"{number:,} tokens: {problem}" if problem else None


def _one_of_two(trial: Trial) -> str | None:
    """One of two processes that train together is killed: the other ends soon, without a traceback of ours."""
    running = _started(TOGETHER, trial)
    _at_work(running, TOGETHER, trial)
    try:
        victim, killed = _kill_one(running, trial, "vizattn train"), time.monotonic()
    finally:
        ended = running.end()
    seconds, left = time.monotonic() - killed, running.left(PATIENCE)
    # torchrun itself shows where in torch it noticed; that is not ours to change.
    ours = [part for part in ended.output.split("Traceback (most recent call last)")[1:] if "vizattn/" in part]
    problem = None
    if ended.hung or left or seconds > 2 * PATIENCE:
        problem = f"the other took {seconds:.0f} s to end, and processes {left} stayed"
    elif ours:
        problem = f"a traceback: {ours[0][-1500:]}"
    return _goes_on(trial, TOGETHER, f"process {victim} killed", problem, ended)


CASES = [
    Case("workers", "loader killed", _again(_loader)),
    Case("workers", "loaders without parent", _again(_without_parent)),
    Case("workers", "worker of a study killed", _again(_study_worker)),
    Case("workers", "no memory for a cell", _too_large),
    Case("workers", "one of two processes killed", _again(_one_of_two)),
]
