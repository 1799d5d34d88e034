"""The campaign of faults counts what is planted for it: it can fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def tools_are_importable() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def try_out(tmp_path: Path) -> Iterator[Callable[..., list[str | None]]]:
    """What a case yields in so many rounds, on a stage whose fixtures are an empty folder."""
    from faults.campaign import Case, Trial
    from faults.stage import Stage

    with Stage(tmp_path / "stage") as stage:
        stage.once("fixtures", lambda: tmp_path)

        def rounds(case: Case, count: int) -> list[str | None]:
            found: list[str | None] = []
            for number in range(count):
                folder = Path(tempfile.mkdtemp(dir=tmp_path))
                found += case.run(Trial(random.Random(number), folder, stage, number))
            return found

        yield rounds


def command(script: str, **more: Any) -> Any:
    """A command of the campaign that is a script, in the place of vizattn; its result is the file ``out/x``."""
    from faults.commands import Command, files

    lines = "import os, sys, time\nfrom pathlib import Path\nPath('out').mkdir(exist_ok=True)\n" + textwrap.dedent(
        script
    )
    return Command("planted", lambda fixtures: [], files, launcher=("-c", lines), **more)


HALF = """
    with open("out/x", "w") as file:
        file.write("x" * 10_000)
        file.flush()
        for i in range(40):
            Path(f"out/.{i}").touch()
        file.write("x" * 10_000)
"""
WHOLE = """
    Path("out/.x").write_text("x" * 20_000)
    os.replace("out/.x", "out/x")
"""


def test_files_that_are_half_written_when_killed_are_counted(try_out: Any) -> None:
    from faults.campaign import Case
    from faults.kills import _kill

    lost = try_out(Case("kills", "half", _kill(command(HALF))), 4)
    assert any(lost) and all("neither as before" in each for each in lost if each)


def test_files_that_are_whole_when_killed_are_not(try_out: Any) -> None:
    from faults.campaign import Case
    from faults.kills import _kill

    assert try_out(Case("kills", "whole", _kill(command(WHOLE))), 3) == [None] * 3


def test_a_traceback_on_a_full_disk_and_one_that_is_not_told_are_counted(try_out: Any) -> None:
    from faults.campaign import Case
    from faults.disks import _full

    silent = f"try:\n{textwrap.indent(textwrap.dedent(WHOLE), '    ')}\nexcept OSError:\n    sys.exit('Oh.')\n"
    told = silent.replace("OSError:", "OSError as error:").replace("'Oh.'", "str(error)")
    for script, words in ((WHOLE, "a traceback"), (silent, "does not say"), (told, None)):
        (lost,) = try_out(Case("disks", "planted", _full(command(script))), 1)
        assert words in lost if words else lost is None


def test_what_depends_on_the_time_is_counted(try_out: Any) -> None:
    from faults.campaign import Case
    from faults.clocks import _jumping

    script = "times = [time.time() for _ in range(100)]\nPath('out/x').write_text(str(max(times) - min(times) < 60))"
    (lost,) = try_out(Case("clocks", "planted", _jumping(command(script))), 1)
    assert lost and "instead of" in lost


def test_readers_that_fail_hang_die_or_run_code_are_counted(
    try_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle
    import signal
    import time

    import torch  # noqa: F401  (the children need not, then)
    from faults import files, hostile
    from faults.readers import Reader

    def prepare(fixtures: Path, folder: Path) -> Path:
        (folder / "x").write_bytes(pickle.dumps(1))
        return folder / "x"

    def read(path: Path) -> object:
        data = path.read_bytes() if path.is_file() else b""
        if data == b"hang":
            time.sleep(60)
        if data == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        if data == b"other":
            return 2
        if data == b"memory":
            return bytes(8 << 30)
        return pickle.loads(data or pickle.dumps(1))

    made = {name: name.encode() for name in ("hang", "die", "other", "memory", "broken")}
    made["code"] = pickle.dumps(hostile._Touch("eval"))
    reader = Reader("planted", prepare, read, True, made=lambda whole: made)
    monkeypatch.setattr(files, "READERS", [reader])
    monkeypatch.setattr(files, "IN_PLACE", {})
    monkeypatch.setattr(files, "MANY", 20)
    monkeypatch.setattr(files, "SECONDS", 1.0)
    monkeypatch.setattr(files, "_forks", multiprocessing.get_context("fork"))
    from faults.campaign import Case

    lost = [each for each in try_out(Case("files", "planted", files._read_many(reader)), 1) if each]
    for words in ("hang: hung", "die: process ended by SIGKILL", "other values were read", "MemoryError", "broken: "):
        assert any(words in each for each in lost), words
    assert any("code of the file was run" in each for each in lost)


def test_a_traceback_after_a_worker_died_is_counted(try_out: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from faults import workers
    from faults.campaign import Case

    script = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
        Path("out/.begun").touch()
        if child.wait():
            raise RuntimeError("a worker died")
        Path("out/x").write_text("done")
    """
    monkeypatch.setattr(workers, "LOADING", command(textwrap.dedent(script)))
    (lost,) = try_out(Case("workers", "planted", workers._again(workers._loader)), 1)
    assert lost and "a worker died" in lost


def test_what_is_lost_is_in_the_table_the_file_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from faults import __main__ as program
    from faults.campaign import Case

    def broken(trial: Any) -> Iterator[str | None]:
        raise KeyError("the campaign itself")

    def cases(*lost: str | None) -> Callable[[], list[Case]]:
        return lambda: [Case("kills", "planted", lambda trial: iter(lost))]

    out = tmp_path / "faults.json"
    monkeypatch.setattr(sys, "argv", ["faults", "--seed", "1", "--rounds", "2", "--out", str(out)])
    monkeypatch.setattr(program, "all_cases", cases(None, None))
    assert program.main() == 0
    monkeypatch.setattr(program, "all_cases", cases(None, "half a file"))
    assert program.main() == 1
    (tally,) = json.loads(out.read_text())["cases"]
    assert (tally["tried"], sorted(tally["lost"])) == (4, ["round 0: half a file", "round 1: half a file"])
    assert "LOST round 1: half a file" in capsys.readouterr().out
    monkeypatch.setattr(program, "all_cases", lambda: [Case("kills", "broken", broken)])
    assert program.main() == 1


def test_damage_is_the_same_by_the_same_seed() -> None:
    from faults.damage import damage_bytes, damage_json

    whole = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    for damage in (damage_bytes, damage_json):
        first, again = ([damage(whole, random.Random(i)) for i in range(200)] for _ in range(2))
        assert first == again and sum(data != whole for _, data in first) > 150
