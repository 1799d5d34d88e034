"""`python tools/benchmark.py GROUP ...` is `vizattn bench GROUP ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
