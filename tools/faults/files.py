"""Damaged and hostile files: every reader gives what it should or says what is wrong, in bounded time and memory.

Readers are called in forked processes with limits on memory and time; some files go through the command line.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from faults.campaign import Case, Trial
from faults.damage import IN_PLACE, damage_bytes, damage_json
from faults.hostile import SENTINEL
from faults.readers import READERS, Reader

__all__ = ["CASES"]

MANY = 300
"""Files of a reader of cost 1 in each round, beside the hostile ones."""
SECONDS = 30.0
"""For reading one file; none takes one on a quiet machine."""
MEMORY = 3 << 30
"""Bytes that reading may take beside what the process has."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["faults.warm"])


def _read_many(reader: Reader) -> Callable[[Trial], Iterator[str | None]]:
    def run(trial: Trial) -> Iterator[str | None]:
        count = max(20, round(MANY / reader.cost))
        fixtures, seed = trial.stage.fixtures, trial.random.randrange(1 << 30)
        number: int | None = 0
        while number is not None:
            ours, theirs = _forks.Pipe(duplex=False)
            job = (reader.name, str(fixtures), str(trial.folder), seed, number, count, theirs)
            process = _forks.Process(target=_child, args=job, daemon=True)
            process.start()
            theirs.close()
            number = yield from _follow(ours, process)

    return run


def _follow(pipe: Connection, process: BaseProcess) -> Generator[str | None, None, int | None]:
    """Pass on what a child finds; gives the number of the file to go on with, None at the end."""
    number, label = -1, "before any file"
    while True:
        try:
            told = pipe.recv() if pipe.poll(SECONDS if number >= 0 else 120) else "hung"
        except EOFError:
            told = "died"
        if told == "end":
            process.join()
            return None
        if isinstance(told, tuple):
            number, label = told
        elif told in ("hung", "died"):
            if told == "hung":
                process.kill()
            process.join()
            code = process.exitcode or 0
            how = f"hung for {SECONDS:.0f} s" if told == "hung" else f"process ended by {_ending(code)}"
            yield f"file {number}, {label}: {how}"
            return number + 1 if number >= 0 else None
        else:
            yield None if told == "" else f"file {number}, {label}: {told}"


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _child(name: str, fixtures: str, folder: str, seed: int, first: int, count: int, pipe: Connection) -> None:
    """Damage and read files `first`, `first + 1`, ...; tells each number and label, and then what was lost or ""."""
    import torch

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = next(each for each in READERS if each.name == name)
    place = Path(folder) / "reading"
    os.environ |= {"VIZATTN_HOME": str(Path(folder) / "home"), "HF_HUB_OFFLINE": "1"}
    path = _fresh(reader, Path(fixtures), place)
    os.chdir(place)
    whole = path.read_bytes()
    expected = reader.read(path)
    made = [*reader.made(whole).items()]
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY,) * 2)
    for number in range(first, len(made) + len(IN_PLACE) + count):
        moments = random.Random(f"{seed}/{number}")
        os.chdir("/")
        path = _fresh(reader, Path(fixtures), place)
        os.chdir(place)
        label = _spoil(reader, path, whole, made, number, moments)
        pipe.send((number, label))
        pipe.send(_outcome(reader, path, expected))
    pipe.send("end")


def _fresh(reader: Reader, fixtures: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return reader.prepare(fixtures, place)


def _spoil(
    reader: Reader, path: Path, whole: bytes, made: list[tuple[str, bytes]], number: int, moments: random.Random
) -> str:
    """Damage `path`; gives how, in words."""
    path.unlink()
    if number < len(made):
        label, data = made[number]
        path.write_bytes(data)
        return label
    if number < len(made) + len(IN_PLACE):
        label = [*IN_PLACE][number - len(made)]
        IN_PLACE[label](path)
        return label
    damage = damage_json if reader.json and moments.random() < 0.6 else damage_bytes
    label, data = damage(whole, moments)
    path.write_bytes(data)
    return label


def _outcome(reader: Reader, path: Path, expected: object) -> str:
    """What was lost by reading; nothing where all is well."""
    told = ""
    try:
        found = reader.read(path)
        right = reader.known or (lambda found, expected: not reader.same or found == expected)
        if not right(found, expected):
            told = "other values were read, and nobody was told"
    except Exception as error:
        known = {kind.__name__ for kind in type(error).__mro__} & {*reader.errors}
        if not known:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else ""
            told = f"{type(error).__name__}: {str(error)[:200]} ({place})"
        elif not str(error).strip():
            told = f"a {type(error).__name__} without a message"
    except BaseException as error:
        told = f"{type(error).__name__}"
    if Path(SENTINEL).exists():
        Path(SENTINEL).unlink()
        told = "code of the file was run"
    return told


CASES = [Case("files", reader.name, _read_many(reader)) for reader in READERS]
