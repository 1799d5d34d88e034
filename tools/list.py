"""`python tools/list.py ...` is `vizattn list ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["list", *sys.argv[1:]]))
