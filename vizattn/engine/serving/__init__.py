"""A trained model behind a small web page and a JSON endpoint, for this machine: ``pip install "vizattn[serve]"``."""

from __future__ import annotations

import importlib.util

from vizattn.errors import VizattnError

__all__ = ["need_packages"]


def need_packages() -> None:
    """See that the packages of the extra are installed.

    Raises:
        VizattnError: They are not.
    """
    names = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
    missing = [package for module, package in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise VizattnError(f'Serving needs {" and ".join(missing)}: pip install "vizattn[serve]"')
