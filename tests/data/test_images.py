import itertools
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vizattn.data.images import find_images, load_rgb, quiet, unreadable


@pytest.fixture
def photo():
    ramp = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3)
    return Image.fromarray((ramp + np.random.default_rng(0).normal(0, 20, ramp.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode, photo, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    else:
        image = photo.convert(mode)
    suffix = {"F": "tiff", "CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    image.save(tmp_path / f"x.{suffix}")
    loaded = load_rgb(tmp_path / f"x.{suffix}")
    assert loaded.mode == "RGB" and loaded.size == photo.size
    grey, expected = np.asarray(loaded.convert("L"), float), np.asarray(photo.convert("L"), float)
    assert abs(grey.mean() - expected.mean()) < 4  # the same brightness
    if mode != "1":
        assert abs(grey - expected).mean() < 12  # and the same picture


def test_16_bits_are_scaled_by_257(tmp_path):
    Image.fromarray(np.array([[0, 257 * 7, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(load_rgb(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_parts_become_white(mode, tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    image.convert(mode).save(tmp_path / "x.png", **({"transparency": 0} if mode == "P" else {}))
    pixels = np.asarray(load_rgb(tmp_path / "x.png"))
    if mode == "RGBA":
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 3].tolist() == [255, 0, 0]
    else:
        palette_zero = np.asarray(image.convert("P")) == 0
        assert (pixels[palette_zero] == 255).all()


def test_exif_orientation_is_applied(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo.save(tmp_path / "x.png", exif=exif)
    loaded = load_rgb(tmp_path / "x.png")
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(photo), -1))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_rgb(tmp_path / "x.gif").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("whole", [False, True])
def test_broken_files_are_found(suffix, whole, photo, tmp_path):
    good, cut, empty, text = (str(tmp_path / f"{name}.{suffix}") for name in ("good", "cut", "empty", "text"))
    photo.save(good)
    data = (tmp_path / f"good.{suffix}").read_bytes()
    for path, content in ((cut, data[: len(data) // 2]), (empty, b""), (text, b"this is no picture" * 50)):
        with open(path, "wb") as file:
            file.write(content)
    found = unreadable([good, cut, empty, text, str(tmp_path / "missing.png")], whole=whole)
    assert list(found) == [cut, empty, text, str(tmp_path / "missing.png")]
    assert found[empty] == "the file is empty" and found[text] == "not an image file"
    for path in (cut, empty, text):
        with pytest.raises(OSError):
            load_rgb(path)


def test_damage_in_the_middle_is_found_by_decoding(photo, tmp_path):
    path = tmp_path / "x.png"
    photo.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    assert list(unreadable([str(path)], whole=True)) == [str(path)]


def test_a_repaired_file_is_looked_at_again(photo, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"no")
    assert unreadable([str(path)], whole=False)
    photo.save(path)
    assert not unreadable([str(path)], whole=False)


def test_images_are_found_sorted_and_hidden_files_left_out(photo, tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.png", ".hidden.png", ".thumbs/d.png", "__MACOSX/e.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(tmp_path / name, format="PNG")
    assert find_images(str(tmp_path)) == ["a.png", "b.JPG", "deep/er/c.png"]


def test_looking_for_damage_leaves_the_warning_filters_alone(tmp_path, monkeypatch):
    opened, delays = Image.open, itertools.cycle([0.003, 0.001, 0.002])

    def slow(path, **options):  # so that threads overlap, and end in another order than they began
        time.sleep(next(delays))
        return opened(path, **options)

    monkeypatch.setattr(Image, "open", slow)
    paths = [str(tmp_path / f"{i}.png") for i in range(60)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    before = list(warnings.filters)
    assert unreadable(paths, whole=True) == {}
    assert warnings.filters == before


def test_a_link_to_a_folder_above_is_not_walked_again(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "inner" / "a.png")
    (tmp_path / "inner" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert find_images(str(tmp_path)) == ["inner/a.png"]


@pytest.mark.parametrize(
    "least_side, size", [(None, (64, 48)), (25, (64, 48)), (24, (32, 24)), (5, (8, 6)), (99, (64, 48))]
)
def test_jpeg_files_are_decoded_smaller_where_that_is_asked_for(least_side, size, photo, tmp_path):
    photo.save(tmp_path / "x.jpg")
    photo.save(tmp_path / "x.png")
    assert load_rgb(tmp_path / "x.jpg", least_side=least_side).size == size
    assert load_rgb(tmp_path / "x.png", least_side=least_side).size == (64, 48)
    small = np.asarray(load_rgb(tmp_path / "x.jpg", least_side=least_side), float)
    assert abs(small.mean() - np.asarray(photo, float).mean()) < 2


def test_smaller_decoding_keeps_the_orientation(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "x.jpg", exif=exif)
    assert load_rgb(tmp_path / "x.jpg").size == (48, 64)
    assert load_rgb(tmp_path / "x.jpg", least_side=24).size == (24, 32)
    assert load_rgb(tmp_path / "x.jpg", upright=False, least_side=24).size == (32, 24)


def test_warnings_are_heard_again_after_any_number_of_threads() -> None:
    """However their ways in and out cross, the filters are in the end what they were."""
    before = [*warnings.filters]
    inside = threading.Barrier(8)

    def pause(number: int) -> None:
        with quiet():
            inside.wait()
            time.sleep(0.002 * (number % 3))
            warnings.warn("not heard", stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(5):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(pause, range(8)))
        warnings.warn("heard", stacklevel=1)
    assert [str(remark.message) for remark in heard] == ["heard"]
    assert [*warnings.filters] == before
