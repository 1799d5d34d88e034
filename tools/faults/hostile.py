"""Files that somebody made to do harm: run code, fill the memory, never end."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

__all__ = ["SENTINEL", "images", "json_files", "lines", "pickles", "safetensors", "texts"]

SENTINEL = "the-code-of-a-file-was-run"
"""The file that hostile pickles write, in the folder of the process that reads them."""


class _Touch:
    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.how == "eval":
            return eval, (f"open({SENTINEL!r}, 'w').write('eval')",)
        if self.how == "open":
            return open, (SENTINEL, "w")
        return os.system, (f"touch {SENTINEL}",)


def pickles() -> dict[str, bytes]:
    """Checkpoints that run code when a careless program reads them, and broken archives around them."""
    import torch

    found: dict[str, bytes] = {}
    for how in ("system", "eval", "open"):
        for name, content in (
            ("alone", _Touch(how)),
            ("inside", {"model": {"x": torch.zeros(2)}, "args": _Touch(how)}),
        ):
            for zipped in (True, False):
                file = io.BytesIO()
                torch.save(content, file, _use_new_zipfile_serialization=zipped)
                found[f"{how} {name}, {'zip' if zipped else 'old'}"] = file.getvalue()
            for protocol in (0, 2, 4):
                found[f"{how} {name}, pickle {protocol}"] = pickle.dumps(content, protocol)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for entry in ("storages", "tensors", "pickle", "../escaped"):
            data = pickle.dumps(_Touch("system"))
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found["a tar file"] = file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", pickle.dumps(_Touch("eval"), 2))
        packed.writestr("archive/../../escaped", b"x")
        packed.writestr("archive/data/0", bytes(50_000_000))
    found["a bomb"] = file.getvalue()
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    file = io.BytesIO()
    torch.save({"model": deep, "format_version": 1}, file)
    found["deep"] = file.getvalue()
    found["deeper"] = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    return found


def safetensors() -> dict[str, bytes]:
    """Headers that lie about their length, their tensors, or their depth."""

    def file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    def one(**kwargs: Any) -> bytes:
        return json.dumps({"x": entry(**kwargs)}).encode()

    whole = bytes(8)
    many = {f"x{i}": entry(shape=[0], offsets=[0, 0]) for i in range(50_000)}
    return {
        "a length of 2^63": file(b"{}", length=1 << 63),
        "a length of 2^64 - 1": file(b"{}", length=(1 << 64) - 1),
        "a length of 99 million": file(b"{}", length=99_999_999),
        "more than there is": file(one(), bytes(4)),
        "less than there is": file(one(), bytes(80)),
        "a huge shape": file(one(shape=[1 << 40, 1 << 40]), whole),
        "an overflowing shape": file(one(shape=[1 << 62, 4, 2]), whole),
        "a negative shape": file(one(shape=[-2]), whole),
        "offsets turned": file(one(offsets=[8, 0]), whole),
        "offsets beyond": file(one(offsets=[1 << 60, (1 << 60) + 8]), whole),
        "an unknown type": file(one(dtype="F31"), whole),
        "overlapping": file(json.dumps({"x": entry(), "y": entry()}).encode(), whole),
        "twice the same": file(b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2), whole),
        "deep": file(b'{"x":' * 100_000 + b"0" + b"}" * 100_000),
        "many": file(json.dumps(many).encode()),
        "odd notes": file(b'{"__metadata__":{"a":1},"x":%s}' % json.dumps(entry()).encode(), whole),
        "no object": file(b"[1,2]"),
        "no UTF-8": file(b'{"\xff":1}'),
    }


def _png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def images() -> dict[str, bytes]:
    """Small files that unpack to pictures nobody can hold, and odd ones."""
    from PIL import Image

    zeros = zlib.compress(bytes(60_000_000), 9)
    found = {
        "60000 x 60000": _png(60_000, 60_000, zeros),
        "12000 x 12000": _png(12_000, 12_000, zeros),
        "2^31 x 1": _png((1 << 31) - 1, 1, zeros),
        "no pixels": _png(0, 0, b""),
        "a text that unpacks": _png(8, 8, zlib.compress(bytes(8 * 25)), (b"zTXt", b"a\0\0" + zeros)),
        "a profile that unpacks": _png(8, 8, zlib.compress(bytes(8 * 25)), (b"iCCP", b"a\0\0" + zeros)),
        "a palette without colours": _png(8, 8, zlib.compress(bytes(8 * 9)), (b"PLTE", b"")),
        "a chunk of 2^31": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 1 << 31) + b"IHDR",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file quit\n",
        "PPM": b"P6 99999 99999 255\n",
        "TIFF with a loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    }
    small = Image.new("RGB", (9, 7), "green")
    for format_ in ("GIF", "TIFF", "WEBP", "BMP", "TGA", "PPM", "JPEG2000", "ICO", "PCX"):
        file = io.BytesIO()
        small.save(file, format_)
        data = file.getvalue()
        found[f"{format_} of ones"] = data[:16] + b"\xff" * (len(data) - 16)
        found[f"half a {format_}"] = data[: len(data) // 2]
    return found


def json_files() -> dict[str, bytes]:
    """JSON that readers stumble over."""
    from faults.damage import strange_values

    found = {f"{value[:20]} alone": value.encode() for value in strange_values()}
    found |= {
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "not closed": b"[" * 1_000_000,
        "UTF-16": '{"format_version": 1}'.encode("utf-16"),
        "a mark": b"\xef\xbb\xbf{}",
        "latin": '{"Käse": 1}'.encode("latin-1"),
        "a null byte": b'{"a": "\0"}',
        "twice": b'{"format_version": 1, "format_version": 99}',
        "a page": b"<html><body>Please log in</body></html>",
    }
    return found


def texts() -> dict[str, bytes]:
    """Lists of names that are none."""
    return {
        "a huge index": b"0: a\n99999999999: b\n",
        "an index of 5000 digits": b"9" * 5000 + b": b\n",
        "other digits": "٣: three\n²: two\n".encode(),
        "null bytes": b"\0" * 1000,
        "one endless line": b"x" * 3_000_000,
        "many lines": b"".join(b"class %d\n" % i for i in range(200_000)),
        "the same line": b"cat\n" * 1000,
        "line ends": b"cat\r\ndog\rbird\x0bfish\x85\xe2\x80\xa8cow",
        "UTF-16": "cat\ndog\n".encode("utf-16"),
        "not UTF-8": b"cat\n\xff\xfe\xfd\n",
        "colons": b":\n::\n0:\n",
        "minus": b"-1: cat\n-2: dog\n",
    }


def lines(good: bytes) -> dict[str, bytes]:
    """Files of JSON lines in which others stand among the good ones."""
    strange = [value for value in json_files().values() if b"\n" not in value]
    return {
        "strange lines": good + b"".join(line + b"\n" for line in strange),
        "before": b"".join(line + b"\n" for line in strange) + good,
        "no ends": good.replace(b"\n", b""),
        "carriage returns": good.replace(b"\n", b"\r\n"),
        "zeros within": good + bytes(4096) + b"\n" + good,
    }


def put(path: Path, data: bytes) -> None:
    """Write, whatever was there."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
