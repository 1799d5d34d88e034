"""Makes the modules beside it importable, as tests are imported by path; one thread for each process of the tests."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it
sys.path.insert(0, str(Path(__file__).parent))
