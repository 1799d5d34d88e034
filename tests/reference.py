"""The recorded outputs of published code in `golden/`, and the rule by which its weights and inputs were made."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Any]:
    """A recorded case."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def weight(key: str, shape: list[int], gain: float = 1.0) -> Tensor:
    """The value of `key`, drawn in float64 and stored as float32, returned as float64."""
    n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif key.endswith("running_mean"):
        n = 0.1 * n
    elif key.endswith("num_batches_tracked"):
        n = np.zeros(shape)
    elif n.ndim >= 2:
        n = gain * n / np.sqrt(np.prod(shape[1:]))
    elif key.endswith(".weight"):
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.from_numpy(np.asarray(n, dtype=np.float32)).double()


def weights(case: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a case under the released keys; index tables, which are computed, are left out."""
    computed = {entry["name"] for entry in case["constant_buffers"]}
    return {key: weight(key, shape, case["weight_gain"]) for key, shape in case["keys"] if key not in computed}


def normal_input(tag: str, shape: tuple[int, ...]) -> Tensor:
    """The input of a case, as float64."""
    n = np.random.default_rng(zlib.crc32(tag.encode())).standard_normal(shape)
    return torch.from_numpy(n.astype(np.float32)).double()


def relative_error(value: Tensor, expected: Any) -> float:
    """Largest difference over the largest recorded value."""
    reference = torch.as_tensor(expected, dtype=torch.float64)
    return float((value.detach().double() - reference).abs().max() / reference.abs().max())
