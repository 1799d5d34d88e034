"""Two processes on gloo: every method trains without unused parameters, and both end with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

from rows import DENSE, METHODS, REFUSED, create, create_segmenter, images  # noqa: E402

import vizattn  # noqa: E402


def main() -> None:
    """Three steps of each method on each family; prints one line a combination from rank 0."""
    dist.init_process_group("gloo")
    for row in ("vit_va", "eva02", "swin", "efficientvit"):
        for method, (name, options) in METHODS.items():
            if row not in REFUSED.get(method, ()):
                torch.manual_seed(5)
                train(vizattn.attach(create(row), name, **options), method, row)
    for method, row in DENSE:
        if row in ("vit_va", "swin"):
            train(create_segmenter(row, method), method, f"maps of {row}")
    dist.destroy_process_group()


def train(model: torch.nn.Module, method: str, row: str) -> None:
    """Three steps on other images in each process."""
    rank = dist.get_rank()
    model = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for step in range(3):  # an unused parameter raises in the second forward
        model(images(4, seed=10 * step + rank)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert flat.isfinite().all() and torch.equal(both[0], both[1]), (method, row)
    if rank == 0:
        print("ok", method, row, flush=True)


if __name__ == "__main__":
    main()
