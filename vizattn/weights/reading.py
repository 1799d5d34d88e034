"""Read a file of weights without ever running code from it."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from vizattn.errors import VizattnError
from vizattn.files import check_regular

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
    check_regular(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if kind := _kind(head):
        return kind
    what = "not a file of weights"
    if not head:
        what = "an empty file"
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        what = "a web page"
    elif head[:1] == b"\x80" and head[1:2] in (b"\x03", b"\x04", b"\x05"):
        what = "a bare pickle, which only its author's code could read, and not a file of weights"
    raise VizattnError(f"{path.name} is {what}; it begins with {head[:24]!r}.")


class _Ignored:
    """Stands for a number or an array of NumPy beside the weights: nothing of it is computed or kept."""

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _Settings:
    """Stands for the configuration that Swin's training script stores: becomes a plain dictionary."""

    def __new__(cls, *_args: object) -> Any:
        return OrderedDict()


# What training scripts store beside the weights, by the names in their files. None of these classes is imported: what
# takes their place does nothing.
_HARMLESS: list[Any] = [argparse.Namespace, (_Settings, "yacs.config.CfgNode")]
_HARMLESS += [(_Ignored, f"numpy.{name}") for name in ("dtype", "ndarray")]
_HARMLESS += [
    (_Ignored, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")
]


def read_weights(path: Path) -> dict[str, Any]:
    """The checkpoint in a safetensors file or a file of `torch.save`, on the CPU.

    Besides tensors and plain values `argparse.Namespace` is read, and some classes that training scripts store are
    passed over (`_HARMLESS`). No other object is made, no code of the file runs.

    Raises:
        VizattnError: Damaged, something else than a checkpoint, or holding an object of a class that is refused.
        OSError: There is no such file.
    """
    import torch
    from safetensors.torch import load_file

    kind = check_is_weights(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        # An open file, as torch goes by the name of a path.
        with torch.serialization.safe_globals(_HARMLESS), open(path, "rb") as file:
            _check_archive(file)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, VizattnError):
        raise
    except Exception as error:  # a damaged pickle makes its reader fail in any way
        reason = str(error)
        # Only torch tells it, in a sentence: "Unsupported global: GLOBAL posix.system was not an allowed global ..."
        refused = re.search(r"(?:GLOBAL (?=[\w.])|(?:of type|import of|class) (?=\w+\.))([\w.]+)", reason)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise VizattnError(
                f"{path} is refused: it holds an object of {refused[1]}, and reading that could run code of the file. "
                "Only tensors, plain values and argparse.Namespace are read; if you trust its author, save its weights "
                "alone by torch in a file of their own."
            ) from error
        told = reason.partition("WeightsUnpickler error: ")[2] or reason
        first = re.split(r"\.\s|\n", f"{told}\n")[0].rstrip(".") or type(error).__name__
        raise VizattnError(f"{path} cannot be read as weights, it is damaged or cut short: {first}.") from error
    if not isinstance(checkpoint, dict):
        raise VizattnError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights.")
    return checkpoint


def _check_archive(file: BinaryIO) -> None:
    """Refuse a zip archive that `torch.save` did not write: a program, or one that unpacks to more than it has."""
    if file.read(2) == b"PK":
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:  # torch says what is wrong with it
            entries = archive.infolist()
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise VizattnError(f"{file.name} is a TorchScript program, not a file of weights.")
            if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
                raise VizattnError(f"{file.name} is refused: it is compressed, which torch does not do.")
    file.seek(0)
