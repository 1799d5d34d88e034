"""`python tools/convert.py FILE NAME` is `vizattn weights convert FILE NAME`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["weights", "convert", *sys.argv[1:]]))
