"""Speed and memory of attention ops, backbones, adapters, start-up and data, beside those of others in the same run.

A group makes `Case`s (`ops.py`, `backbones.py`, `adapters.py`, `startup.py`, `data.py`); `measure` times those of one
comparison in turn and gives `Row`s, a file of which `compare` holds against another and `draw` plots.
"""

from vizattn.bench.case import Case, Options, Unavailable, Work
from vizattn.bench.compare import Change, compare
from vizattn.bench.groups import GROUPS, cases_of
from vizattn.bench.plot import draw
from vizattn.bench.rows import Row, read_rows, write_rows
from vizattn.bench.timing import measure

__all__ = [
    "GROUPS",
    "Case",
    "Change",
    "Options",
    "Row",
    "Unavailable",
    "Work",
    "cases_of",
    "compare",
    "draw",
    "measure",
    "read_rows",
    "write_rows",
]
