"""Processes that die beside others: loaders, workers of a study, one of two that train together, for want of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
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


def _wait_for(running: Running, path: Path, then: float) -> None:
    """Until `path` is there, and `then` seconds more."""
    while running.process.poll() is None and not path.exists():
        time.sleep(0.02)
    deadline = time.monotonic() + then
    while running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _arguments(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _kill_one(running: Running, trial: Trial, words: str = "") -> int | None:
    """SIGKILL to one of the processes below, of those with `words` in their arguments."""
    found = [pid for pid in descendants(running.process.pid) if words in _arguments(pid)]
    if not found:
        return None
    victim = trial.random.choice(found)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        return victim
    return None


def _goes_on(trial: Trial, command: Command, told: str, problem: str | None, ended: Ended) -> str | None:
    """What is wrong with a run, or when it is resumed, if anything is."""
    usual, env = undisturbed(trial.stage, command), trial.stage.env(trial.folder)
    if not problem and ended.status:
        args = [*command.args(trial.stage.fixtures), *command.go_on]
        again = vizattn(args, trial.folder, env, launcher=command.launcher)
        problem = misbehaviour(again, allowed=(0,))
    problem = problem or differs(command, trial.folder, usual.new)
    return f"{told}: {problem}" if problem else None


def _loader(trial: Trial) -> Iterator[str | None]:
    """A process that loads images is killed: the run says so, and can be resumed."""
    usual = undisturbed(trial.stage, LOADING)
    env, args = trial.stage.env(trial.folder), LOADING.args(trial.stage.fixtures)
    running = Running(args, trial.folder, env)
    _wait_for(running, trial.folder / "out" / "train.log", trial.random.uniform(0, 0.5 * usual.seconds))
    victim = _kill_one(running, trial)
    ended = running.end()
    problem = misbehaviour(ended, allowed=(0, 1, 2))
    yield _goes_on(trial, LOADING, f"loader {victim} killed", problem, ended)


def _without_parent(trial: Trial) -> Iterator[str | None]:
    """The run is killed, and its loaders must not stay."""
    usual = undisturbed(trial.stage, LOADING)
    env, args = trial.stage.env(trial.folder), LOADING.args(trial.stage.fixtures)
    running = Running(args, trial.folder, env)
    _wait_for(running, trial.folder / "out" / "train.log", trial.random.uniform(0, 0.5 * usual.seconds))
    running.kill(whole=False)
    ended = running.end()
    left = running.left(PATIENCE)
    problem = f"loaders {left} stayed for {PATIENCE:.0f} s" if left else None
    yield _goes_on(trial, LOADING, "killed alone", problem, ended)


def _study_worker(trial: Trial) -> Iterator[str | None]:
    """Workers of a study are killed one after the other; others take their place."""
    usual = undisturbed(trial.stage, STUDY_2)
    env, args = trial.stage.env(trial.folder), STUDY_2.args(trial.stage.fixtures)
    running = Running(args, trial.folder, env)
    _wait_for(running, trial.folder / "out" / "locks", 0)
    victims = []
    for _ in range(2):
        _wait_for(running, trial.folder / "out", trial.random.uniform(0.1, 0.3) * usual.seconds)
        victims.append(_kill_one(running, trial, "spawn_main"))
    ended = running.end()
    # The same cell may have met its end twice: then it has failed with that reason, and is computed again on request.
    again = vizattn([*args, "--retry-failed"], trial.folder, env) if ended.status == 1 else ended
    problem = misbehaviour(ended, allowed=(0, 1)) or misbehaviour(again, allowed=(0,))
    problem = problem or (None if ended.status else differs(STUDY_2, trial.folder, usual.new))
    yield f"workers {victims} killed: {problem}" if problem else None


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


def _one_of_two(trial: Trial) -> Iterator[str | None]:
    """One of two processes that train together is killed: the other ends soon, without a traceback of ours."""
    usual = undisturbed(trial.stage, TOGETHER)
    env, args = trial.stage.env(trial.folder), TOGETHER.args(trial.stage.fixtures)
    running = Running(args, trial.folder, env, launcher=TORCHRUN)
    _wait_for(running, trial.folder / "out" / "train.log", trial.random.uniform(0, 0.5 * usual.seconds))
    victim = _kill_one(running, trial, "vizattn train")
    killed = time.monotonic()
    ended = running.end()
    left = running.left(PATIENCE)
    # torchrun itself shows where in torch it noticed; that is not ours to change.
    ours = [part for part in ended.output.split("Traceback (most recent call last)")[1:] if "vizattn/" in part]
    problem = None
    if ended.hung or left:
        problem = f"processes {left} went on for more than {PATIENCE:.0f} s"
    elif victim and time.monotonic() - killed > 2 * PATIENCE:
        problem = f"the other took {time.monotonic() - killed:.0f} s to end"
    elif ours:
        problem = f"a traceback: {ours[0][-1500:]}"
    yield _goes_on(trial, TOGETHER, f"process {victim} killed", problem, ended)


CASES = [
    Case("workers", "loader killed", _loader),
    Case("workers", "loaders without parent", _without_parent),
    Case("workers", "worker of a study killed", _study_worker),
    Case("workers", "no memory for a cell", _too_large),
    Case("workers", "one of two processes killed", _one_of_two),
]
