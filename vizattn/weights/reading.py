"""Read a file of weights without ever running code from it."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

from vizattn.errors import VizattnError

__all__ = ["check_is_weights", "read_weights"]


def _kind(head: bytes) -> str | None:
    """``"safetensors"``, ``"torch"`` or None, by the first 16 bytes: the file's name says nothing."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:  # the limit of the format
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):  # a zip archive, or before torch 1.6 a bare pickle
        return "torch"
    return None


def check_is_weights(path: Path) -> str:
    """``"safetensors"`` or ``"torch"``.

    Raises:
        VizattnError: It is something else, such as the page of a login.
        OSError: There is no such file.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if kind := _kind(head):
        return kind
    what = "an empty file" if not head else "a web page" if head.lstrip().startswith(b"<") else "not a file of weights"
    raise VizattnError(f"{path.name} is {what}; it begins with {head[:24]!r}.")


def read_weights(path: Path) -> dict[str, Any]:
    """The checkpoint in a safetensors file or a file of `torch.save`, on the CPU.

    Besides tensors and plain values only `argparse.Namespace` is accepted, which many training scripts store.

    Raises:
        VizattnError: Damaged, something else than a checkpoint, or holding an object of a class that is refused.
        OSError: There is no such file.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = check_is_weights(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        # An open file, as torch goes by the name of a path.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error)
        # Only torch tells it, in a sentence: "Unsupported global: GLOBAL posix.system was not an allowed global ..."
        refused = re.search(r"(?:GLOBAL|of type|import of|class) ([\w.]+\.[\w.]+)", reason)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise VizattnError(
                f"{path} is refused: it holds an object of {refused[1]}, and reading that could run code of the file. "
                "Only tensors, plain values and argparse.Namespace are read; if you trust its author, save its weights "
                "alone by torch in a file of their own."
            ) from error
        first = next(iter(reason.splitlines()), type(error).__name__).rstrip(".")
        raise VizattnError(f"{path} cannot be read as weights, it is damaged or cut short: {first}.") from error
    if not isinstance(checkpoint, dict):
        raise VizattnError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights.")
    return checkpoint
