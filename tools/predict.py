"""`python tools/predict.py ...` is `vizattn predict ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
