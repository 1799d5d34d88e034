"""`python tools/train.py CONFIG ...` is `vizattn train CONFIG ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
