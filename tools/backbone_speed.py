"""Time of backbones in units of resnet50's: `python tools/backbone_speed.py NAME ... [--train]`.

Each round measures resnet50 before and after every backbone in the same process; the median ratio is printed, with the
peak memory of the backbone alone where `--memory` is given (a process each).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch

import vizattn


def step_of(name: str, batch: int, size: int, train: bool, options: argparse.Namespace) -> Callable[[], None]:
    """One forward pass, or one training step without its optimizer."""
    model = timm.create_model(name).train(train)
    x = torch.randn(batch, 3, size, size)
    if options.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if options.fuse and name != "resnet50":
        vizattn.fuse(model)

    def run() -> None:
        if train:
            model.zero_grad(set_to_none=True)
            model(x).sum().backward()
        else:
            with torch.inference_mode():
                model(x)

    return run


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def times(name: str, options: argparse.Namespace, reference: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Of each round, the time in units of `reference`'s and in seconds."""
    run = step_of(name, options.batch, options.size, options.train, options)
    seconds(run)
    ratios, wall = [], []
    for _ in range(options.rounds):
        around = [seconds(reference)]
        wall.append(seconds(run))
        around.append(seconds(reference))
        ratios.append(wall[-1] / (sum(around) / 2))
    return ratios, wall


def main() -> None:
    """Print a line a backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="forward and backward in training mode")
    parser.add_argument("--fuse", action="store_true", help="fuse convolutions with their norms first")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", action="store_true", help="print the peak memory of the process instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory and len(options.names) > 1:
        for name in options.names:
            subprocess.run([sys.executable, *sys.argv[:1], name, *[a for a in sys.argv[1:] if a not in options.names]])
        return
    if options.memory:
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step_of(options.names[0], options.batch, options.size, options.train, options)()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{options.names[0]:32s} {(after - before) / 1024:8.0f} MB above the process without it")
        return
    reference = step_of("resnet50", options.batch, options.size, options.train, options)
    seconds(reference)
    for name in options.names:
        ratios, wall = times(name, options, reference)
        print(
            f"{name:32s} {statistics.median(ratios):7.3f} of resnet50 "
            f"({min(ratios):.3f} to {max(ratios):.3f}), {statistics.median(wall) * 1e3:8.1f} ms"
        )


if __name__ == "__main__":
    main()
