"""Files are read with care and written in pairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vizattn import files
from vizattn.errors import unknown
from vizattn.files import checked_file, parse_json, read_json, read_json_lines, read_text, sha256_of, write_with_note


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        for read in (read_text, read_json, read_json_lines, sha256_of):
            with pytest.raises(OSError, match="Not a regular file"):
                read(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, '["\\ud800"]', "9" * 5000, ""])
def test_json_that_cannot_be_used_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    with pytest.raises(ValueError):
        parse_json(text.encode())


def test_characters_of_two_halves_are_whole() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


def test_lines_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n3\n[]\n\0\0\n' + b"[" * 100_000 + b'\n{"b": 2}\n{"c": ')
    assert read_json_lines(path) == [{"a": 1}, {"b": 2}]


def test_an_interrupted_pair_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, note = tmp_path / "w", tmp_path / "w.json"
    replace, left = os.replace, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(source, target)

    for stop in range(4):
        monkeypatch.setattr(files.os, "replace", replace)
        write_with_note(weights, lambda path: path.write_bytes(b"old"), note, {"name": "old"})
        monkeypatch.setattr(files.os, "replace", interrupted)
        left = stop
        try:
            write_with_note(weights, lambda path: path.write_bytes(b"new"), note, {"name": "new"})
        except KeyboardInterrupt:
            assert stop < 3
        about = read_json(note)
        found = checked_file(weights, about["weights_sha256"])
        assert found is not None and found.read_text() == about["name"] == ("old" if stop < 2 else "new")
    weights.write_bytes(b"damaged")
    assert checked_file(weights, about["weights_sha256"]) is None


def test_an_endless_name_is_shortened() -> None:
    assert len(str(unknown("option", "x" * 1_000_000, ["a", "b"]))) < 1000


def test_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    files.write_text(tmp_path / "x.json", '["\udcff.png"]')
    assert (tmp_path / "x.json").read_text() == '["\\udcff.png"]'
