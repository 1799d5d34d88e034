"""Run the notebooks from top to bottom: `python tools/run_notebooks.py [NAME ...] [--out DIR]`; status 1 if one fails.

Each runs in a folder of its own below DIR, and is written there with its outputs; those in `notebooks/` have none.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "notebooks"


def run(path: Path, out: Path) -> float:
    """Run one notebook; returns the seconds it took.

    Raises:
        CellExecutionError: A cell failed.
    """
    folder = out / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    try:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        nbformat.write(notebook, folder / path.name)
    return time.perf_counter() - started


def main() -> int:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/notebooks"), help="default: %(default)s")
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}")
    failed = 0
    for name in options.names or names:
        try:
            print(f"{name}: {run(FOLDER / f'{name}.ipynb', options.out):.0f} s", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{name} failed:\n{error}", file=sys.stderr, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
