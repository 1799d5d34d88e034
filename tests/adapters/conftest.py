"""Makes `rows` importable: test modules are imported by path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
