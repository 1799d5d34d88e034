"""`python tools/export.py ...` is `vizattn export ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
