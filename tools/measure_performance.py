"""Measure what docs/performance.md shows, or some runs of it: `python tools/measure_performance.py [RUN ...]`.

`python tools/make_performance.py --from DIR` then writes the page. Peers come with `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vizattn.errors import VizattnError, unknown


class Run(NamedTuple):
    """One call of `vizattn bench`."""

    about: str
    arguments: str

    @property
    def group(self) -> str:
        """What it measures, which names its CSV file."""
        return self.arguments.split()[0]


RUNS = {
    "ops": Run("attention beside others", "ops --size 56x56 28x28"),
    "growth": Run("attention by size", "ops --only vizattn --size 14x14 28x28 56x56 112x112 --rounds 3"),
    "backbones": Run("backbones, batch 2", "backbones --mode forward --threads 2 --no-memory"),
    "fused": Run(
        "EfficientViT, fused",
        "backbones --only efficientvit --mode forward --variant eager fuse fuse+channels_last --threads 2 --no-memory",
    ),
    "batch32": Run(
        "backbones, batch 32",
        "backbones --model biformer_tiny deit_agent_tiny agent_swin_tiny efficientvit_va_m0 efficientvit_va_m4"
        " l2vit_tiny nat_mini dinat_mini vit_va_tiny_patch16_224 halonet_va_h1"
        " --mode forward --batch 32 --rounds 3 --threads 2 --no-memory",
    ),
    "variants": Run(
        "backbones under autocast and with channels last",
        "backbones --model biformer_tiny deit_agent_tiny agent_swin_tiny efficientvit_va_m4 l2vit_tiny nat_mini"
        " vit_va_tiny_patch16_224 halonet_va_h1 --mode forward --batch 8 --dtype fp32 amp"
        " --variant eager channels_last --rounds 3 --threads 2 --no-memory",
    ),
    "sizes": Run(
        "backbones by size of the image",
        "backbones --model nat_mini dinat_mini halonet_va_h1 deit_agent_tiny agent_swin_tiny agent_pvt_tiny l2vit_tiny"
        " efficientvit_va_m0 efficientvit_va_m4 vit_va_tiny_patch16_224 biformer_tiny"
        " --mode forward --batch 1 --size 224x224 448x448 896x896 --rounds 3 --threads 2 --no-memory",
    ),
    "train": Run(
        "steps of training of backbones, batch 2", "backbones --mode train --rounds 3 --threads 2 --no-memory"
    ),
    "train32": Run(
        "training of backbones, batch 32",
        "backbones --model biformer_tiny deit_agent_tiny efficientvit_va_m0 l2vit_tiny nat_mini halonet_va_h1"
        " vit_va_tiny_patch16_224 --mode train --batch 32 --rounds 2 --threads 2 --no-memory",
    ),
    "adapters": Run("training of adapters", "adapters --rounds 7 --threads 2"),
    "startup": Run("imports, commands, creating models", "startup --rounds 10 --no-memory"),
    "data": Run("loading images", "data --rounds 2"),
}


def place(name: str) -> Path:
    """The CSV file of a run within the folder of all results."""
    group = RUNS[name].group
    return Path("" if name == group else name, f"{group}.csv")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 all done, 1 a run failed, 2 an unknown run, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"some of {', '.join(RUNS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/bench"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        return _measure([_known(name) for name in args.runs] or list(RUNS), args.out)
    except VizattnError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _known(name: str) -> str:
    if name not in RUNS:
        raise unknown("run", name, RUNS)
    return name


def _measure(names: Sequence[str], out: Path) -> int:
    failed = []
    for number, name in enumerate(names, 1):
        command = ["vizattn", "bench", *RUNS[name].arguments.split(), "--out", str((out / place(name)).parent)]
        print(f"\n[{number}/{len(names)}] {name}: {RUNS[name].about}\n{shlex.join(command)}\n", flush=True)
        if subprocess.call([sys.executable, "-m", *command]):
            failed.append(name)
    if failed:
        print(f"\nFailed, as told above: {', '.join(failed)}.", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
