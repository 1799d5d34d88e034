"""Full disks, read-only folders: told in one message, whole files stay, and the command succeeds when there is room."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.campaign import Case, Trial
from faults.command import misbehaviour, vizattn
from faults.commands import (
    ATTEND,
    AVERAGE,
    EVAL,
    EXPORT,
    FETCH,
    MASKS,
    PREDICT,
    STUDY,
    STUDY_2,
    TRAIN,
    Command,
    Undisturbed,
    differs,
    half,
    undisturbed,
)

__all__ = ["CASES"]


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes at `folder`. Raises an OSError where we may not mount."""
    _mount("-t", "tmpfs", "-o", f"size={size},mode=777", "faults", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def _mount(*args: str) -> None:
    done = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"mount {' '.join(args)}: {done.stderr.strip()}")


@functools.cache
def may_mount() -> bool:
    """Whether disks can be mounted here: by root, outside of most containers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError), _mounted(Path(folder), 1 << 16):
        return True
    return False


def _full(command: Command) -> Callable[[Trial], Iterator[str | None]]:
    """The folder that is written to is a disk with too little room, from nearly none to nearly enough."""

    def run(trial: Trial) -> Iterator[str | None]:
        usual = undisturbed(trial.stage, command)
        room = round(trial.random.random() ** 2 * (usual.size if may_mount() else usual.largest))
        for number in range(8):
            place = trial.folder / f"disk{number}"
            place.mkdir()
            enough, problem = _starved(trial, command, usual, place, room)
            if not enough or problem:
                yield f"{room:,} of {usual.size:,} bytes: {problem}" if problem else None
                return
            room //= 3
        yield "the command needed no room at all"

    return run


def _starved(trial: Trial, command: Command, usual: Undisturbed, place: Path, room: int) -> tuple[bool, str | None]:
    """Whether `room` was enough after all, and what was lost."""
    env, args, faults = trial.stage.env(place), command.args(trial.stage.fixtures), {"FOLDER": str(place)}
    with contextlib.ExitStack() as stack:
        if may_mount():
            stack.enter_context(_mounted(place, 1 << 30))
            command.old(trial.stage.fixtures, place / "out")
            used = sum(-(-path.stat().st_size // 4096) * 4096 for path in place.rglob("*"))
            _mount("-o", f"remount,size={used + max(room, 4096)}", str(place))
        else:  # the largest file that may be written, instead of the room for all
            command.old(trial.stage.fixtures, place / "out")
            faults["SIZE"] = str(max(room, 1))
        ended = vizattn(args, place, env, faults=faults, log=trial.folder, launcher=command.launcher)
        problem = misbehaviour(ended) or _unsaid(ended.status, ended.output) or half(command, place, usual)
        if problem or not ended.status:
            return not ended.status, problem or differs(command, place, usual.new)
        if may_mount():
            _mount("-o", "remount,size=1g", str(place))
        ended = vizattn([*args, *command.go_on], place, env, log=trial.folder, launcher=command.launcher)
        problem = misbehaviour(ended, allowed=(0,)) or differs(command, place, usual.new)
        return False, f"with room again: {problem}" if problem else None


def _unsaid(status: int, output: str) -> str | None:
    words = ("No space left", "Read-only", "File too large", "Permission denied", "not permitted", "cannot be written")
    if status and not any(word in output for word in words):
        return f"the message does not say what is wrong with the disk: {output.strip()[-400:]}"
    return None


def _read_only(command: Command) -> Callable[[Trial], Iterator[str | None]]:
    """The folder that is written to, and all that is in it, cannot be written."""

    def run(trial: Trial) -> Iterator[str | None]:
        usual, fixtures = undisturbed(trial.stage, command), trial.stage.fixtures
        place = trial.folder / "disk"
        place.mkdir()
        args, env = command.args(fixtures), trial.stage.env(place)
        with contextlib.ExitStack() as stack:
            if may_mount():
                stack.enter_context(_mounted(place, 64 << 20))
            (place / "out").mkdir(exist_ok=True)
            if usual.old:
                (place / "out").rmdir()
                command.old(fixtures, place / "out")
            if may_mount():
                _mount("-o", "remount,ro", str(place))
            else:
                place.chmod(0o555)
                (place / "out").chmod(0o555)
            ended = vizattn(args, place, env, log=trial.folder, launcher=command.launcher)
            problem = misbehaviour(ended, allowed=(0,) if command is EVAL else (2,))
            problem = problem or _unsaid(ended.status, ended.output) or half(command, place, usual)
            if not may_mount():
                place.chmod(0o755)
                (place / "out").chmod(0o755)
            yield f"read-only: {problem}" if problem else None

    return run


def _no_home(command: Command) -> Callable[[Trial], Iterator[str | None]]:
    """Home, caches and /tmp cannot be written, as in some containers; the folder of the results can."""

    def run(trial: Trial) -> Iterator[str | None]:
        usual, fixtures = undisturbed(trial.stage, command), trial.stage.fixtures
        barred = trial.folder / "barred"
        barred.mkdir()
        command.old(fixtures, trial.folder / "out")
        with contextlib.ExitStack() as stack:
            if may_mount():
                stack.enter_context(_mounted(barred, 1 << 16))
                _mount("-o", "remount,ro", str(barred))
            else:
                barred.chmod(0o555)
            names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "HF_HOME", "VIZATTN_HOME", "TMPDIR")
            env = trial.stage.env(trial.folder) | {name: str(barred) for name in (*names, "MPLCONFIGDIR")}
            ended = vizattn(command.args(fixtures), trial.folder, env, launcher=command.launcher)
            problem = misbehaviour(ended)
            if not problem and ended.status == 0:
                problem = differs(command, trial.folder, usual.new)
            elif not problem:
                problem = _unsaid(ended.status, ended.output)
            yield f"home and /tmp are read-only: {problem}" if problem else None

    return run


_WRITERS = (TRAIN, FETCH, PREDICT, MASKS, ATTEND, EXPORT, AVERAGE, STUDY)
CASES = [
    *(Case("disks", f"{command.name}, full", _full(command)) for command in (*_WRITERS, STUDY_2)),
    *(Case("disks", f"{command.name}, read-only", _read_only(command)) for command in (*_WRITERS, EVAL)),
    *(Case("disks", f"{command.name}, no home", _no_home(command)) for command in (TRAIN, EVAL, STUDY, EXPORT)),
]
