"""The command itself: what it prints, and what it makes of mistakes."""

from __future__ import annotations

import importlib.machinery
import io
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import vizattn.cli
from vizattn import compiled
from vizattn.attention import native
from vizattn.cli import COMMANDS, main
from vizattn.errors import VizattnError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A subcommand `fake` with one option; a test sets its `run`."""
    module = SimpleNamespace(__doc__="Do nothing.", run=lambda args: 0)
    module.add_arguments = lambda parser: (
        parser.add_argument("files", nargs="*"),
        parser.add_argument("--epochs", type=int),
    )
    monkeypatch.setitem(COMMANDS, "fake", "do nothing")
    monkeypatch.setattr(vizattn.cli.importlib, "import_module", lambda name: module)
    return module


def failing(error: BaseException) -> object:
    def run(args: object) -> int:
        raise error

    return run


def test_help_and_version_do_not_load_torch() -> None:
    code = (
        "import sys, vizattn_cli\n"
        "for argument in ('--help', '--version'):\n"
        "    try: vizattn_cli.main([argument])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert vizattn_cli.main(['trian']) == 2\n"
        "assert not {'torch', 'timm', 'rich', 'numpy'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(name in run.stdout for name in COMMANDS)
    assert f"vizattn {vizattn.__version__}, torch " in run.stdout
    assert "Unknown command 'trian'. Did you mean 'train'?" in run.stderr


def test_the_installed_script_runs() -> None:
    script = Path(sys.executable).with_name("vizattn")
    run = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and vizattn.__version__ in run.stdout


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the installed package, with its `compiled.py` and nothing else."""
    package = tmp_path / "vizattn"
    (package / "attention").mkdir(parents=True)
    shutil.copy(compiled.__file__, package)
    spec = importlib.machinery.ModuleSpec("vizattn", None, origin=str(package / "__init__.py"))
    monkeypatch.setitem(sys.modules, "vizattn", SimpleNamespace(__spec__=spec))
    monkeypatch.delenv("VIZATTN_NATIVE", raising=False)
    return package


def end_of_versions(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--version"]) == 0
    return capsys.readouterr().out.strip().partition(", with")[2]


def test_version_tells_why_attention_is_not_compiled(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert end_of_versions(capsys) == "out compiled attention: not compiled when vizattn was installed"
    junk = copied / "attention" / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    junk.write_bytes(b"not a library")
    assert end_of_versions(capsys) == f"out compiled attention: {junk.name} is not a library for this system"
    for off in ("0", "false", "No", "OFF"):
        monkeypatch.setenv("VIZATTN_NATIVE", off)
        assert end_of_versions(capsys) == f"out compiled attention: VIZATTN_NATIVE={off} in the environment"


@pytest.mark.skipif(native.library is None, reason="vizattn was installed without a C++ compiler")
def test_version_tells_whether_the_compiled_library_is_of_this_one(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert native.library is not None
    shutil.copy(native.library._name, copied / "attention")
    assert end_of_versions(capsys) == " compiled attention"
    source = (copied / "compiled.py").read_text(encoding="utf-8")
    newer = compiled.VERSION + 1
    (copied / "compiled.py").write_text(re.sub(r"^VERSION = \d+$", f"VERSION = {newer}", source, flags=re.M))
    assert f"out compiled attention: compiled for another version of vizattn: {newer - 1}" in end_of_versions(capsys)


@pytest.mark.skipif(sys.platform != "linux" or native.library is None, reason="a compiled library of Linux")
def test_a_library_that_was_cut_off_is_not_loaded(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert native.library is not None
    whole = Path(native.library._name).read_bytes()
    library = copied / "attention" / Path(native.library._name).name
    for length in (0, 20, 70, 4096, len(whole) // 2, len(whole) - 1):
        library.write_bytes(whole[:length])
        assert end_of_versions(capsys).startswith(f"out compiled attention: {library.name} is ")


def test_each_subcommand_has_its_module() -> None:
    folder = Path(vizattn.cli.__file__).parent
    assert {name for name in COMMANDS if (folder / f"{name}.py").is_file()} == set(COMMANDS)


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "predict" in capsys.readouterr().err


def test_status_and_arguments_reach_the_subcommand(command: SimpleNamespace) -> None:
    seen = []
    command.run = lambda args: seen.append(args) or 1
    assert main(["fake", "a.png", "--epochs", "3", "b.png"]) == 1
    assert seen[0].files == ["a.png", "b.png"] and seen[0].epochs == 3


def test_unknown_option_names_the_closest(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fake", "--epoch", "3"])
    assert end.value.code == 2
    assert "unknown option '--epoch'. Did you mean '--epochs'?" in capsys.readouterr().err


def test_a_mistake_is_one_message(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = failing(VizattnError("No folder [red]x[/red]."))
    assert main(["fake"]) == 2
    assert capsys.readouterr().err == "vizattn fake: No folder [red]x[/red].\n"


@pytest.mark.parametrize("argv", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_shows_the_traceback(command: SimpleNamespace, argv: list[str]) -> None:
    command.run = failing(VizattnError("No folder."))
    with pytest.raises(VizattnError, match="No folder"):
        main(argv)


def test_warnings_of_the_library_are_one_line(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning

    def run(args: object) -> int:
        for file in (vizattn.__file__, __file__):
            print(warnings.formatwarning("a picture is broken", UserWarning, file, 1, "code"), end="")
        return 0

    command.run = run
    assert main(["fake"]) == 0
    ours, *others = capsys.readouterr().out.splitlines()
    assert ours == "a picture is broken" and "test_main.py:1: UserWarning: a picture is broken" in others[0]
    assert warnings.formatwarning is before


def test_system_errors_are_one_message(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = failing(OSError(28, "No space left on device", "work_dirs/x.pth"))
    assert main(["fake"]) == 2
    assert capsys.readouterr().err == "vizattn fake: No space left on device: work_dirs/x.pth\n"


def test_a_bug_keeps_its_traceback(command: SimpleNamespace) -> None:
    command.run = failing(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        main(["fake"])


def test_interrupt(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = failing(KeyboardInterrupt())
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_closed_pipe_is_silent() -> None:
    code = (
        "import sys, types, vizattn_cli as cli\n"
        "fake = types.SimpleNamespace(__doc__='', add_arguments=lambda parser: None)\n"
        "fake.run = lambda args: [print('line') for _ in range(100_000)] and 0\n"
        "cli.importlib.import_module = lambda name: fake\n"
        "sys.exit(cli.main(['list']))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout and command.stderr
    assert command.stdout.readline() == "line\n"
    command.stdout.close()
    assert command.wait(timeout=60) == 141
    assert command.stderr.read() == ""


def test_a_terminal_that_knows_no_unicode(command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    command.run = lambda args: print("\xb1 \udcff") or 0
    assert main(["fake"]) == 0
    assert written.getvalue() == b"\\xb1 \\udcff\n"
