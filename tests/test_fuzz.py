"""Whatever is in a file, its reader gives a value or says what is wrong: no other exception, none that hangs."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vizattn.adapters import read_bundle
from vizattn.data.class_names import names_in
from vizattn.data.images import load_rgb
from vizattn.data.masks import read_mask
from vizattn.data.transfer import get_suite
from vizattn.data.transfer.lists import read_json, read_list
from vizattn.engine.checkpoint import read_checkpoint, save_checkpoint
from vizattn.engine.config import resolve_config
from vizattn.engine.recipes import load_recipe
from vizattn.engine.vtab.results import Results
from vizattn.errors import VizattnError
from vizattn.weights.reading import read_weights

ROOT = Path(__file__).parents[1]
TOLD = (VizattnError, OSError)


@pytest.fixture(scope="module")
def damage() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tools"))
    import faults.damage

    yield faults.damage
    sys.path.remove(str(ROOT / "tools"))


def _results(path: Path) -> None:
    Results(path.parent).read()


CONFIG = {
    "format_version": 1,
    "vizattn_version": "0.1.0",
    "backbone": {"name": "vit_va_nano_patch4_32", "tag": "glyphs", "args": {}, "dtype": "float32"},
    "adapters": [{"method": "vpt", "options": {"num_tokens": 2}}],
    "segmenter": None,
    "num_classes": 2,
    "class_names": ["a", "b"],
    "preprocessing": {"mean": [0.5, 0.5, 0.5]},
    "fingerprint": "0",
    "weights_sha256": "0",
    "metadata": {},
}
RECIPE = {"model": {"name": "vit_va_nano_patch4_32"}, "data": {"name": "digits"}, "schedule": {"epochs": 2}}
TASK = {"name": "near", "group": "g", "num_classes": 3, "layout": "lists", "splits": {"train": [8]}}
CELL = {"format": 1, "kind": "cell", "cell": "1", "status": "failed", "reason": "r", "time": 1.0}
READERS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "bundle": ("adapter_config.json", json.dumps(CONFIG).encode(), lambda path: read_bundle(path.parent)),
    "recipe": ("recipe.json", json.dumps(RECIPE).encode(), lambda path: resolve_config(load_recipe(path))),
    "suite": ("suite.json", json.dumps({"name": "s", "tasks": [TASK]}).encode(), get_suite),
    "list of JSON": ("test.json", b'{"images/a.png": 0, "images/b.png": 1}', read_json),
    "list": ("test.txt", b"images/a.png 0\nimages/b.png 1\n", lambda path: read_list(path, 2)),
    "class names": ("classes.txt", b"0: cat\n1: dog\n", names_in),
    "results": ("results.jsonl", json.dumps(CELL).encode() + b"\n", _results),
}


def _quietly(read: Callable[[Path], Any], path: Path) -> None:
    with contextlib.suppress(*TOLD):
        read(path)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), data=st.binary(max_size=200))
def test_text_files(name: str, seed: int, data: bytes, damage: Any, tmp_path: Path) -> None:
    """Bytes of any kind, the file with damaged bytes, and with strange values in the place of others."""
    file, whole, read = READERS[name]
    (tmp_path / "adapter_model.safetensors").touch()
    path, moments = tmp_path / file, random.Random(seed)
    tries = [data, damage.damage_bytes(whole, moments)[1]]
    if path.suffix in (".json", ".jsonl"):
        tries.append(damage.damage_json(whole, moments)[1])
    for content in tries:
        path.write_bytes(content)
        _quietly(read, path)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_pictures(seed: int, kind: str, damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    Image.radial_gradient("L").resize((32, 32)).save(path, kind)
    path.write_bytes(damage.damage_bytes(path.read_bytes(), random.Random(seed))[1])
    for read in (load_rgb, read_mask):
        with contextlib.suppress(OSError):
            read(path)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_checkpoint_is_read_as_it_was_or_not_at_all(seed: int, damage: Any, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "x.pth"
    model = {"weight": torch.arange(100.0)}
    header = {"format_version": 1, "config": {"a": 1}, "class_names": ["a"], "preprocessing": {}}
    save_checkpoint(path, {**header, "model": model})
    path.write_bytes(damage.damage_bytes(path.read_bytes(), random.Random(seed))[1])
    with contextlib.suppress(*TOLD):
        assert torch.equal(read_checkpoint(path)["model"]["weight"], model["weight"])
    _quietly(read_weights, path)
