"""`python -m vizattn ...` is the `vizattn` command, for launchers such as torchrun that start a module."""

import sys

from vizattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
