"""Run timm's own model tests, unmodified, on our backbones: `make timm-suite`.

    python tools/timm_suite.py ["vit_va_*"] [-- PYTEST_ARGUMENTS]

The tests are those of the installed version, from timm's source distribution on the package index (kept in `.cache`).
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"


def our_models(pattern: str) -> list[str]:
    """The names that importing vizattn adds to timm and that match `pattern`."""
    import timm

    import vizattn.models

    names = timm.list_models()
    ours = [name for name in names if timm.model_entrypoint(name).__module__.startswith(vizattn.models.__name__ + ".")]
    return fnmatch.filter(ours, pattern)


def timm_tests() -> Path:
    """timm's source distribution without the package, so that the tests test the installed one."""
    name = f"timm-{version('timm')}"
    folder = CACHE / name
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        download += ["--no-deps", "--no-binary", "timm", "--dest", temporary, name.replace("-", "==")]
        subprocess.run(download, check=True)
        with tarfile.open(Path(temporary) / f"{name}.tar.gz") as archive:
            wanted = [m for m in archive if m.name.startswith((f"{name}/tests/", f"{name}/pyproject.toml"))]
            archive.extractall(temporary, members=wanted, filter="data")
        os.replace(Path(temporary) / name, folder)
    return folder


def main() -> int:
    """Give pytest's exit status."""
    parser = argparse.ArgumentParser(description="Run timm's own model tests on our backbones.")
    parser.add_argument("pattern", nargs="?", default="*", help='names to test, such as "vit_va_*" (all)')
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()

    names = our_models(args.pattern)
    if not names:
        print(f"None of {', '.join(our_models('*'))} matches {args.pattern!r}.", file=sys.stderr)
        return 2
    print(f"timm {version('timm')}'s tests/test_models.py on: {', '.join(names)}")
    # TORCH_BACKEND is imported before the tests list timm's models; GITHUB_ACTIONS leaves out the tests that download;
    # TIMEOUT is in seconds a test, and longer than timm's own for busy machines.
    environment = {"TIMEOUT": "600"} | os.environ | {"TORCH_BACKEND": "vizattn", "GITHUB_ACTIONS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-p", "no:cacheprovider", "-q"]
    command += ["-k", " or ".join(names), *args.pytest]
    return subprocess.run(command, cwd=timm_tests(), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
