"""Time and memory of a training step of each adapter, against full fine-tuning and prompts inserted as tokens.

    python tools/benchmark.py [--model vit_base_patch16_224] [--batch 16] [--steps 4] [--csv FILE]

Each case runs in a process of its own, `rounds` times in turn; the time is the median step over all rounds, the memory
is the peak of the resident set above what the process held before its first step.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "linear_probe": ("linear_probe", {}),
    "efficient_probing": ("efficient_probing", {}),
    "vpt p=50": ("vpt", {"num_tokens": 50}),
    "vpt p=50, inserted as tokens": ("inserted", {"num_tokens": 50}),
    "apla r=8": ("apla", {"num_rows": 8}),
    "apla r=128": ("apla", {"num_rows": 128}),
    "hst": ("hst", {}),
    "side_tuning": ("side_tuning", {}),
    "linear_probe, cached": ("linear_probe", {"cached": True}),
    "efficient_probing, cached": ("efficient_probing", {"cached": True}),
}


def insert_prompts(model: Any, num_tokens: int) -> None:
    """Deep prompts by the published definition: tokens put in before every block and taken out after it."""
    import torch
    from torch import nn

    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        block.prompts = nn.Parameter(torch.empty(num_tokens, model.embed_dim).uniform_(-0.06, 0.06))
        block.register_forward_pre_hook(
            lambda m, args: torch.cat([args[0][:, :1], m.prompts.expand(len(args[0]), -1, -1), args[0][:, 1:]], dim=1)
        )
        block.register_forward_hook(lambda m, _, out: torch.cat([out[:, :1], out[:, 1 + len(m.prompts) :]], dim=1))


def measure(case: str, name: str, batch: int, steps: int) -> dict[str, float]:
    """Seconds a step and peak MB of one case, in this process."""
    import timm
    import torch

    import vizattn
    from vizattn.adapters import frozen_features, head_from_features
    from vizattn.memory import PeakMemory

    method, options = CASES[case]
    cached = options.get("cached", False)
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=100)
    if method == "inserted":
        insert_prompts(model, **options)
        model.eval()  # as an attached adapter keeps the frozen parts
    else:
        options = {k: v for k, v in options.items() if k != "cached"}
        vizattn.attach(model, method, keep_original=False, **options)
        model.train()
    x = torch.randn(batch, *model.pretrained_cfg["input_size"])
    forward: Any = model
    if cached:
        x = torch.cat([frozen_features(model, image[None]) for image in x])
        forward = lambda features: head_from_features(model, features)  # noqa: E731
    labels = torch.randint(0, 100, (batch,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before = resident_mb()
    peak = PeakMemory(torch.device("cpu"))
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(forward(x), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "memory_mb": peak.megabytes() - before}


def resident_mb() -> float:
    """Resident memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status: memory is measured on Linux only")


def main() -> None:
    """Run all cases, or one of them with --case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cases whose name holds one of these")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.model, args.batch, args.steps)))
        return
    cases = [c for c in CASES if c == "full" or not args.only or any(text in c for text in args.only)]
    found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            command = [sys.executable, __file__, "--case", case, "--model", args.model]
            command += ["--batch", str(args.batch), "--steps", str(args.steps)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[case].append(json.loads(out.splitlines()[-1]))
    rows: list[dict[str, Any]] = []
    for case in cases:
        seconds = statistics.median(f["seconds"] for f in found[case])
        memory = statistics.median(f["memory_mb"] for f in found[case])
        rows.append({"case": case, "seconds": seconds, "memory_mb": memory})
    full = rows[0]
    print(f"{args.model}, batch {args.batch}: one training step on this CPU")
    print(f"{'case':32}{'s/step':>9}{'of full':>9}{'MB':>8}{'of full':>9}")
    for r in rows:
        r["time_of_full"], r["memory_of_full"] = r["seconds"] / full["seconds"], r["memory_mb"] / full["memory_mb"]
        print(
            f"{r['case']:32}{r['seconds']:9.3f}{r['time_of_full']:9.3f}{r['memory_mb']:8.0f}{r['memory_of_full']:9.3f}"
        )
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
