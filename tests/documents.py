"""Blocks of code in a document: run in their order in one empty folder, or checked where they cannot run here.

A comment on the line before a block says what is special about it:

``<!-- not run: REASON -->``  Python must compile, and its imports, names, attributes and keywords exist; command lines
                              must parse. `make` and `pip` are never run, and need no comment.
``<!-- fails -->``            a `VizattnError` in Python, on the command line exit status 2

``<!-- slow: REASON -->`` anywhere in a document makes running it a test marked slow; otherwise it is only checked.

A block of ``text`` right after one that runs is what it prints, or the message it fails with; ``...`` stands for what
varies, and white space does not count.
"""

from __future__ import annotations

import contextlib
import copy
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import timm.models._registry as timm_registry
from checked import check_commands, check_python

import vizattn
from vizattn.adapters import METHODS
from vizattn.attention import ATTENTION
from vizattn.cli import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
NEVER_RUN = ("make", "pip")


class Block(NamedTuple):
    """One fenced block: its language, its text, the line it begins at, and the comment before it."""

    language: str
    code: str
    line: int
    mark: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is executed."""
        never = self.language == "bash" and self.code.startswith(NEVER_RUN)
        return self.language in ("python", "bash") and not never and not self.mark.startswith("not run: ")


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a Markdown file.

    Raises:
        AssertionError: A comment before a block that is none of those above.
    """
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        mark, line = match["mark"] or "", text[: match.start("code")].count("\n") + 1
        assert mark in ("", "fails") or re.match(r"(not run|slow): \w", mark), f"{path.name}, line {line}: {mark!r}"
        found.append(Block(match["language"], match["code"], line, mark))
    return found


def is_slow(path: Path) -> bool:
    """Whether a document takes long to run."""
    return re.search(r"^<!-- slow: \w", path.read_text(encoding="utf-8"), flags=re.MULTILINE) is not None


class Page:
    """A document whose blocks share one folder and one module."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.module = types.ModuleType(f"page_{path.stem}")
        self.names: set[str] = set()
        """Names of blocks that do not run, which later ones of these may use."""

    def check(self) -> None:
        """Check all blocks, as if none could run."""
        for block in blocks_of(self.path):
            self._check(block, f"{self.path.relative_to(ROOT)}, block at line {block.line}")

    def run(self) -> list[Block]:
        """Run or check all blocks, in their order; returns those that ran."""
        ran, printed = [], None
        for block in blocks_of(self.path):
            place = f"{self.path.relative_to(ROOT)}, block at line {block.line}"
            if block.runs:
                run = self._python if block.language == "python" else self._bash
                printed = run(block, place)
                ran.append(block)
            elif block.language == "text":
                if printed is not None:
                    _compare(block.code, printed, place)
                printed = None
            else:
                printed = None
                self._check(block, place)
        return ran

    def _check(self, block: Block, place: str) -> None:
        if block.language == "python":
            self.names |= check_python(block.code, {**vars(self.module), **dict.fromkeys(self.names)}, place)
        elif block.language == "bash":
            check_commands(block.code, place)

    def _python(self, block: Block, place: str) -> str:
        code = compile(block.code, place, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.mark == "fails":
                with pytest.raises(vizattn.VizattnError) as caught:
                    exec(code, vars(self.module))
                return str(caught.value)
            exec(code, vars(self.module))
        return printed.getvalue()

    def _bash(self, block: Block, place: str) -> str:
        lines = logical_lines(block.code)
        if all(_is_plain(line) for line in lines):
            runs = [_in_process(shlex.split(line, comments=True)[1:]) for line in lines]
        else:
            runs = [_in_bash(block.code, self.folder)]
        status = max(run[0] for run in runs)
        said = "\n".join(f"{out}\n{err}" for _, out, err in runs)
        assert status == (2 if block.mark == "fails" else 0), f"{place}: status {status}\n{said}"
        return "".join(run[2 if block.mark == "fails" else 1] for run in runs)


def logical_lines(code: str) -> list[str]:
    """Command lines, continued ones joined, without comments that have a line to themselves."""
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _is_plain(line: str) -> bool:
    """Whether a line starts vizattn and asks nothing of the shell: it can run in this process, which saves seconds."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", line).partition(" #")[0]
    return line.startswith("vizattn ") and not re.search(r"[|<>&;$`*?{}]", unquoted)


def _in_process(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def _in_bash(code: str, folder: Path) -> tuple[int, str, str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-e", "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout, run.stderr


def _compare(wanted: str, printed: str, place: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(wanted, printed, options)
    assert same, f"{place} says\n{wanted}\nbut the block before it prints\n{printed}"


@contextlib.contextmanager
def opened(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """A page in an empty folder, offline; what its code registers is forgotten afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    page = Page(path, folder)
    monkeypatch.setitem(sys.modules, page.module.__name__, page.module)
    tables = [METHODS, ATTENTION, *(v for v in vars(timm_registry).values() if isinstance(v, dict | set))]
    before = [copy.copy(t) if t is METHODS or t is ATTENTION else copy.deepcopy(t) for t in tables]
    try:
        yield page
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
