"""`python tools/eval.py WORK_DIR ...` is `vizattn eval WORK_DIR ...`."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
