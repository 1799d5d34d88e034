"""Round the weights of a training run to half precision, for shipping: `python tools/pack_weights.py RUN [TARGET]`.

RUN is a work directory of `vizattn train` without an adapter, or a safetensors file. TARGET is replaced whole; it is
where the package keeps the weights of the backbone that was trained, unless it is given.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pack(source: Path, target: Path) -> None:
    """Write `source` to `target` with all floating-point tensors in float16.

    Raises:
        ValueError: A value is not finite, or is too large for float16.
    """
    tensors = load_file(source / "model" / "model.safetensors" if source.is_dir() else source)
    packed = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in packed.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of {source} does not fit into half precision.")
    temporary = target.with_name(f".{target.name}.tmp")
    save_file(packed, temporary, metadata={"format": "pt"})
    os.replace(temporary, target)
    print(f"{target}: {len(packed)} tensors, {target.stat().st_size / 1e6:.2f} MB")


def place_of(run: Path) -> Path:
    """Where the package keeps the weights of the backbone that `run` trained."""
    name = json.loads((run / "config.json").read_text())["model"]["name"]
    return Path(__file__).resolve().parents[1] / "vizattn" / "weights" / f"{name}.safetensors"


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    pack(run, Path(sys.argv[2]) if len(sys.argv) == 3 else place_of(run))
