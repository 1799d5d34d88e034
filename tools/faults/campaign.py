"""Cases, their rounds, and the count of what was tried and what was lost."""

from __future__ import annotations

import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from faults.stage import Stage

__all__ = ["Case", "Tally", "Trial", "run_campaign", "write_json"]


@dataclass(frozen=True)
class Trial:
    """One round of a case."""

    random: random.Random
    """By the seed, the case and the round: the same again with the same seed."""
    folder: Path
    """Empty, of this round alone."""
    stage: Stage
    """What all cases share."""
    round: int
    attempt: int = 0
    """How often the moment was missed at which something should have been damaged."""

    @property
    def hurry(self) -> float:
        """What waits are multiplied by: the undisturbed command may have run while the machine was busier."""
        return 0.6**self.attempt


@dataclass(frozen=True)
class Case:
    """One way to damage one thing. `run` yields for each fault that it tried None, or what was lost, in words."""

    kind: str
    name: str
    run: Callable[[Trial], Iterator[str | None]]


@dataclass
class Tally:
    """What came of one case."""

    kind: str
    name: str
    tried: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)


def run_campaign(
    cases: Sequence[Case],
    *,
    seed: int,
    rounds: int,
    jobs: int,
    keep: bool = False,
    report: Callable[[Tally], None] = lambda tally: None,
) -> list[Tally]:
    """Try every case `rounds` times, `jobs` at once; `report` is told of each round as it ends.

    Folders of rounds that lost something stay with `keep`, and are named.
    """
    tallies = {(case.kind, case.name): Tally(case.kind, case.name) for case in cases}
    root = Path(tempfile.mkdtemp(prefix="vizattn-faults-"))
    try:
        with Stage(root / "stage") as stage, ThreadPoolExecutor(jobs) as pool:
            running = {
                pool.submit(_one_round, case, seed, number, root, stage, keep): case
                for number in range(rounds)
                for case in cases
            }
            for future in _ended(running, pool):
                case, found = running[future], future.result()
                tally = tallies[case.kind, case.name]
                tally.tried += found.tried
                tally.lost += found.lost
                tally.seconds = round(tally.seconds + found.seconds, 1)
                report(found)
    finally:
        if not keep or not any(tally.lost for tally in tallies.values()):
            remove(root)
    return [*tallies.values()]


def _ended(running: Iterable[Future[Tally]], pool: ThreadPoolExecutor) -> Iterator[Future[Tally]]:
    """As they end; after an interruption no further one is begun."""
    try:
        yield from as_completed(running)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _one_round(case: Case, seed: int, number: int, root: Path, stage: Stage, keep: bool) -> Tally:
    found, start = Tally(case.kind, case.name), time.monotonic()
    folder = root / f"{case.kind}-{case.name.replace('/', '_').replace(' ', '_')}-{number}"
    folder.mkdir()
    trial = Trial(random.Random(f"{seed}/{case.kind}/{case.name}/{number}"), folder, stage, number)
    try:
        for lost in case.run(trial):
            found.tried += 1
            if lost is not None:
                found.lost.append(f"round {number}: {lost}")
    except Exception:  # a campaign that fails itself has shown nothing
        found.tried += 1
        found.lost.append(f"round {number}: the case itself failed: {traceback.format_exc()}")
    found.seconds = time.monotonic() - start
    if found.lost and keep:
        found.lost[-1] += f" [kept in {folder}]"
    else:
        remove(folder)
    return found


def remove(folder: Path) -> None:
    """Remove a folder, whatever a case made of it."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def write_json(tallies: Sequence[Tally], path: Path, **about: object) -> None:
    """All counts, and what was lost, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "cases": [asdict(tally) for tally in tallies]}, indent=2) + "\n")
