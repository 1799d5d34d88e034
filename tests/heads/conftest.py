"""Makes `families`, the backbones of the shared tests, importable: test modules are imported by path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
