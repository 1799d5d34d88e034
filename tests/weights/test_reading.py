"""Files that are hostile, damaged, or of another kind: one message, and nothing of them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from vizattn.errors import VizattnError
from vizattn.weights import read_weights


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> bytes:
    """An archive of torch with other entries (`data_pkl` is data.pkl)."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, replaced.get(name.rpartition("/")[2].replace(".", "_"), source.read(name)))
    return file.getvalue()


def tar(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(VizattnError, match=match) as caught:
        read_weights(path)
    assert path.name in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_do_not_run(protocol: int, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "w.pth"
    bare = pickle.dumps({"model": Malicious(mark)}, protocol)
    refused(path, bare, "not a file of weights|refused|cannot be read as weights")
    refused(path, repacked(saved({"a": 1}), data_pkl=bare), "refused|cannot be read as weights")
    refused(path, tar(sys_info=bare, pickle=bare, storages=bare, tensors=bare), "not a file of weights")
    assert not mark.exists()


@pytest.mark.parametrize(
    "module", ["builtins\neval", "torch\nload", "torch.hub\nload", "os\nsystem", "functools\npartial"]
)
def test_functions_are_not_called(module: str, tmp_path: Path) -> None:
    code = b"\x80\x02c" + module.encode() + b"\nX\x01\x00\x00\x001\x85R."
    refused(tmp_path / "w.pth", repacked(saved({"a": 1}), data_pkl=code), "refused: it holds an object of")


def test_an_archive_that_unpacks_to_more_than_it_has(tmp_path: Path) -> None:
    bomb = repacked(saved({"a": torch.zeros(1_000_000)}), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    refused(tmp_path / "w.pth", bomb, "is compressed, which torch does not do")


def test_a_program_is_no_file_of_weights(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py", "m/version"):
            archive.writestr(name, b"")
    refused(tmp_path / "w.pth", file.getvalue(), "is a TorchScript program")


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": FLOATS, "b": FLOATS},
        {"a": FLOATS | {"data_offsets": [0, 800]}},
        {"a": FLOATS | {"data_offsets": [8, 0]}},
        {"a": FLOATS | {"shape": [-2]}},
        {"a": FLOATS | {"shape": [2**62, 4]}},
        {"a": FLOATS | {"dtype": "EVIL"}},
        {"__metadata__": {"x": 3}, "a": FLOATS},
        b'{"a":' + b"[" * 100_000,
        b'{"\xff":1}',
        b"{",
    ],
    ids=lambda header: str(header)[:40],
)
def test_hostile_headers(header: Any, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    refused(tmp_path / "w", struct.pack("<Q", len(text)) + text + bytes(8), "cannot be read as weights")
    refused(tmp_path / "w", struct.pack("<Q", 50_000_000) + text + bytes(8), "cannot be read as weights")
    refused(tmp_path / "w", struct.pack("<Q", 2**60) + text + bytes(8), "not a file of weights")


def test_any_damage_is_told_in_one_message(tmp_path: Path) -> None:
    """Bytes of the pickle in turn: torch's reader fails in many ways."""
    content = saved({"model": {"a": torch.ones(3)}, "epoch": 3})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        code = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    path, failed = tmp_path / "w.pth", 0
    for i in range(2, len(code), 3):
        damaged = bytearray(code)
        damaged[i] = ord("e") if damaged[i] != ord("e") else ord("R")
        path.write_bytes(repacked(content, data_pkl=bytes(damaged)))
        try:
            assert isinstance(read_weights(path), dict)
        except VizattnError:
            failed += 1
    assert failed > len(code) // 12
