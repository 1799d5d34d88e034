"""The tables list what is released and reported, and each release converts for its native model."""

from __future__ import annotations

import re

import pytest
import torch
from reference import load
from timm.models._registry import _model_pretrained_cfgs

from vizattn.weights import converted, find, manifest, published, release_names, release_of

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


def test_figures_of_papers_are_of_registered_models() -> None:
    numbers = {"top1", "top1_in21k", "params_m", "gmacs"}
    for name, figures in published().items():
        assert figures["source"] == _model_pretrained_cfgs[name].paper_ids, name
        assert set(figures) <= numbers | {"ade20k_miou", "source"}
        assert max(figures.get("top1", 0), figures.get("top1_in21k", 0)) > 60
        assert all(figures[key] > 0 for key in numbers & set(figures))
        for scales in figures.get("ade20k_miou", {}).values():
            assert set(scales) <= {"single_scale", "multi_scale"}
            assert all(40 < value < 55 for value in scales.values()), name


def test_figures_are_there_for_every_release_of_the_families() -> None:
    """Those of the plain ViT are of many papers, none about the model alone; no paper has 11 x 11 neighborhoods."""
    without = {name for name in set(manifest()) - set(published()) if not name.startswith("vit_va_")}
    assert without == {"dinat_large_384_11x11.in22k_ft_in1k"}
