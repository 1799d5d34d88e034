"""Make Python find this environment's editable install before any folder called `vizattn`; run by the Makefile.

Python takes a folder `vizattn` beside a script, such as a clone of this repository, for a package without code, and
asks what editable installs have only after that. A line in site-packages puts those first, at every start of Python.
"""

import sysconfig
from pathlib import Path

LINE = 'import sys; sys.meta_path.sort(key=lambda finder: "__editable__" not in getattr(finder, "__module__", ""))\n'

if __name__ == "__main__":
    # Such files are read in the order of their names, and the finder is installed by __editable__.vizattn-*.pth.
    Path(sysconfig.get_path("purelib"), "vizattn_editable_first.pth").write_text(LINE)
