"""The manifest lists what is released, and each release converts for its native model."""

from __future__ import annotations

import re

import pytest
import torch
from reference import load

from vizattn.weights import converted, find, manifest, release_names, release_of

REMAKE = "python tools/weights_manifest.py"


def test_every_release_has_its_entry_and_no_other() -> None:
    assert {name for name in release_names() if release_of(find(name))} == set(manifest()), REMAKE


def test_entries_are_of_one_form() -> None:
    names = [entry["file"] for entry in manifest().values()]
    assert len(set(names)) == len(names), "they share one folder on a mirror"
    for key, entry in manifest().items():
        assert set(entry) == {"file", "size", "sha256"} and entry["file"].startswith(key)
        assert entry["sha256"] is None or (re.fullmatch("[0-9a-f]{64}", entry["sha256"]) and entry["size"] > 0)


@pytest.mark.parametrize(
    "case, name",
    [
        ("biformer_tiny", "biformer_tiny.in1k"),
        ("efficientvit_m0", "efficientvit_va_m0.in1k"),
        ("timm_efficientvit_m0", "efficientvit_va_m0.r224_in1k"),
        ("timm_vit_tiny_patch16_224", "vit_va_tiny_patch16_224.augreg_in21k_ft_in1k"),
    ],
)
def test_released_keys_convert_without_memory(case: str, name: str) -> None:
    """As `fetch` does it: for a model on the meta device. Values are compared in tests/models/test_parity.py."""
    recorded = load(case)
    with torch.device("meta"):
        state = converted({"model": {key: torch.empty(shape) for key, shape in recorded["keys"]}}, find(name))
    assert sum(value.numel() for key, value in state.items() if "running" not in key) >= recorded["params"]
