"""Makes `rows` and `families`, the models of the shared tests, importable: test modules are imported by path."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("adapters", "models")]

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
