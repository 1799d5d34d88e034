"""The `vizattn` command: finds the subcommand, imports its module, turns errors into one message and a status."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COMMANDS", "main"]

# One module of this package each, with `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "demo": "adapt a pretrained backbone to handwritten digits by six methods",
    "list": "list the backbones, the adapters, or the recipes",
    "info": "show one backbone or one adapter",
    "train": "train a backbone or an adapter from a recipe",
    "eval": "measure a trained model or a bundle",
    "predict": "classify images, or segment them",
    "serve": "a page and a JSON endpoint for a trained model, on this machine",
    "attend": "show what a model looks at in an image",
    "bundle": "show, compare, merge and average bundles",
    "export": "write a model as a file for onnxruntime or torch.export",
    "publish": "put a bundle or a trained model on the Hugging Face hub",
    "data": "check a folder of images and masks",
    "vtab": "measure how backbones transfer with adapters: VTAB-1k and suites like it",
    "bench": "measure speed and memory beside other libraries",
    "weights": "list, fetch, verify and convert released weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0 done, 1 done in part, 2 a mistake, 130 interrupted.

    Args:
        argv: Arguments without the program's name; by default those of the process.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]  # not `list`: a subcommand here bears that name
    # Threads that wait by spinning take the cores from those that work, where others use the machine, too: runs beside
    # each other are several times slower by libgomp's default. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    place = next((i for i, argument in enumerate(argv) if not argument.startswith("-")), len(argv))
    top = _top_parser()
    options = top.parse_args(argv[:place])
    debug = options.debug
    if options.version:
        print(_versions())
        return 0
    if place == len(argv):
        top.print_help(sys.stderr)
        return 2
    command = argv[place]
    if command not in COMMANDS:
        print(
            f"vizattn: Unknown command {command!r}.{_suggest(command, COMMANDS)} See: vizattn --help", file=sys.stderr
        )
        return 2

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text, nor terminals know UTF-8
    messages = _Messages()
    try:
        module = importlib.import_module(f"{__name__}.{command}")
        parser = argparse.ArgumentParser(f"vizattn {command}", description=module.__doc__, allow_abbrev=False)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(parser)
        # Intermixed parsing is for parsers without parts of their own.
        parse = parser.parse_known_args if parser._subparsers else parser.parse_known_intermixed_args
        args, rest = parse(argv[place + 1 :])
        debug = debug or args.debug
        if rest:
            kind = "option" if rest[0].startswith("-") else "argument"
            parser.error(f"unknown {kind} {rest[0]!r}.{_suggest(rest[0], _options(parser))}")
        status: int = module.run(args)
        sys.stdout.flush()  # so that a closed pipe shows here, not when the interpreter ends
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vizattn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from vizattn.errors import VizattnError  # late, as it comes with torch

        if debug or not isinstance(error, VizattnError | OSError):
            raise
        print(f"vizattn {command}: {_message(error)}", file=sys.stderr)
        return 2
    finally:
        messages.end()


class _Messages(logging.Handler):
    """Shows on stderr what the library has to say, such as where weights come from; in the main process of several.

    Its warnings, such as of images that cannot be read, are shown without the line of code they come from.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        self.logger = logging.getLogger("vizattn")
        self.before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        self.format_of_warnings = warnings.formatwarning
        warnings.formatwarning = self._format_warning

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)  # looked up late: a progress bar may stand in for it

    def end(self) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)
        warnings.formatwarning = self.format_of_warnings

    def _format_warning(self, message: Any, category: Any, filename: str, *place: Any, **kwargs: Any) -> str:
        library = getattr(sys.modules.get("vizattn"), "__file__", None)
        if library and Path(library).parent in Path(filename).parents:
            return f"{message}\n"
        return self.format_of_warnings(message, category, filename, *place, **kwargs)


def _top_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "vizattn",
        usage="vizattn [--help] [--version] [--debug] COMMAND ...",
        description="Attention backbones for timm, and adapters that attach to them and to timm's own models.",
        epilog=f"commands:\n{commands}\n\nEach tells its options: vizattn COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the versions that matter")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _versions() -> str:
    packages = ("vizattn", "torch", "torchvision", "timm", "mmengine-lite")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    library, reason = _compiled().load()
    return f"{versions}, with compiled attention" if library else f"{versions}, without compiled attention: {reason}"


def _compiled() -> Any:
    """The module `vizattn.compiled`, without the package around it: that would load torch."""
    package = importlib.util.find_spec("vizattn")
    assert package is not None and package.origin is not None
    place = Path(package.origin).with_name("compiled.py")
    spec = importlib.util.spec_from_file_location("vizattn_compiled", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser and of its parts."""
    parts = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    inner = [option for action in parts for part in action.choices.values() for option in _options(part)]
    return [*parser._option_string_actions, *inner]


def _suggest(name: str, choices: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, [*choices], n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
