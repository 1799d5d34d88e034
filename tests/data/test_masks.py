import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vizattn.data.masks import palette_of, read_mask, to_classes, voc_palette

LABELS = np.array([[0, 1, 2, 255], [20, 3, 128, 7]], dtype=np.uint8)
PALETTE = [value for colour in voc_palette() for value in colour]


def saved(tmp_path, image, name="mask.png", **options):
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


def test_vocs_palette():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert all(voc_palette()[index] == colour for index, colour in known.items())
    assert voc_palette()[255] == (224, 224, 192) and len(set(voc_palette())) == 256 and len(voc_palette(21)) == 21


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "bmp"])
def test_palette_masks_give_indices_whatever_the_colours(tmp_path, suffix):
    image = Image.fromarray(LABELS)
    image.putpalette(PALETTE[::-1])
    path = saved(tmp_path, image, f"mask.{suffix}", **({"optimize": False} if suffix == "gif" else {}))
    assert read_mask(path).dtype == np.uint8 and np.array_equal(read_mask(path), LABELS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_masks_of_few_bits(tmp_path, bits):
    labels = np.arange(8, dtype=np.uint8).reshape(2, 4) % 2**bits
    image = Image.fromarray(labels)
    image.putpalette(PALETTE[: 3 * 2**bits])
    assert np.array_equal(read_mask(saved(tmp_path, image, bits=bits)), labels)


def test_greyscale_of_1_8_and_16_bits(tmp_path):
    assert np.array_equal(read_mask(saved(tmp_path, Image.fromarray(LABELS))), LABELS)
    black = read_mask(saved(tmp_path, Image.fromarray(LABELS > 2)))
    assert black.dtype == np.uint8 and np.array_equal(black, LABELS > 2)
    wide = LABELS.astype(np.uint16)
    wide[0, 0], wide[0, 1] = 300, 65535
    read = read_mask(saved(tmp_path, Image.fromarray(wide)))
    assert read[0].tolist() == [300, 255, 2, 255] and np.array_equal(read[1], LABELS[1])


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_vocs_palette_are_read(tmp_path, mode):
    coloured = Image.fromarray(np.array(voc_palette(), dtype=np.uint8)[LABELS]).convert(mode)
    assert np.array_equal(read_mask(saved(tmp_path, coloured)), LABELS)


def test_grey_colours_are_values_unless_they_are_vocs(tmp_path):
    grey = np.repeat(LABELS[..., None], 3, axis=2)
    assert np.array_equal(read_mask(saved(tmp_path, Image.fromarray(grey))), LABELS)
    bus = np.full((2, 2, 3), 128, dtype=np.uint8)
    assert (read_mask(saved(tmp_path, Image.fromarray(bus))) == 7).all()


def test_other_colours_and_formats_are_refused(tmp_path):
    pixels = np.zeros((4, 5, 3), dtype=np.uint8)
    pixels[2, 3] = (10, 200, 30)
    with pytest.raises(OSError, match=r"colour \(10, 200, 30\) at row 2, column 3 is not in Pascal VOC's palette"):
        read_mask(saved(tmp_path, Image.fromarray(pixels)))
    with pytest.raises(OSError, match="JPEG file cannot hold labels"):
        read_mask(saved(tmp_path, Image.fromarray(LABELS), "mask.jpg"))
    with pytest.raises(OSError, match="mode CMYK"):
        read_mask(saved(tmp_path, Image.new("CMYK", (3, 3)), "mask.tif"))
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(OSError):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("kind", [np.uint8, np.int32])
def test_reducing_the_zero_label(kind):
    labels = np.array([0, 1, 2, 254, 255], dtype=kind)
    reduced = to_classes(labels, reduce_zero_label=True)
    assert reduced.tolist() == [255, 0, 1, 253, 255] and to_classes(labels) is labels


def test_palettes_of_files(tmp_path):
    image = Image.fromarray(LABELS)
    assert palette_of(saved(tmp_path, image), 3) is None
    image.putpalette(PALETTE)
    assert palette_of(saved(tmp_path, image), 21) == voc_palette(21)
    image.putpalette([value for value in range(256) for _ in range(3)])
    assert palette_of(saved(tmp_path, image), 3) is None  # grey on grey shows nothing


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_greyscale_of_few_bits_keeps_its_labels(bits: int, tmp_path: Path) -> None:
    labels = np.arange(2**bits, dtype=np.uint8)[None].repeat(3, 0)
    path = tmp_path / "mask.png"
    rows = b"".join(b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in labels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", labels.shape[1], labels.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert np.array_equal(read_mask(path), labels)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="Not a regular file"):
        read_mask(tmp_path / "x.png")
    assert palette_of(str(tmp_path / "x.png"), 2) is None
