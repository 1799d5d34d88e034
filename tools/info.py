"""`python tools/info.py ...` is `vizattn info ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["info", *sys.argv[1:]]))
