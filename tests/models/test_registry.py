"""Registration: our names are in timm, and none of anybody else's is ever replaced."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import timm

import vizattn.models.vit as vit
from vizattn import VizattnError


def run_module(path: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_names_are_listed() -> None:
    assert set(vit.SIZES) <= set(timm.list_models())
    assert "vit_va_nano_patch4_32.glyphs" in timm.list_models(pretrained=True)
    assert set(timm.list_models(module="vit")) == set(vit.SIZES)


def test_a_taken_name_raises_at_import(tmp_path: Path) -> None:
    before = timm.model_entrypoint("vit_tiny_patch16_224"), timm.get_pretrained_cfg("vit_tiny_patch16_224")
    source = (
        "from vizattn.models._registry import register_model\n"
        "@register_model\n"
        "def vit_tiny_patch16_224(pretrained=False, **kwargs):\n"
        "    return None\n"
    )
    (tmp_path / "clash.py").write_text(source)
    with pytest.raises(VizattnError, match=r"'vit_tiny_patch16_224' from clash: .*taken by timm\.models"):
        run_module(tmp_path / "clash.py", "clash")
    assert before == (timm.model_entrypoint("vit_tiny_patch16_224"), timm.get_pretrained_cfg("vit_tiny_patch16_224"))


@pytest.mark.parametrize("key", vit.HUB_WEIGHTS)
def test_hub_tags_say_what_timm_says(key: str) -> None:
    ours, theirs = timm.get_pretrained_cfg(f"vit_va_{key}"), timm.get_pretrained_cfg(f"vit_{key}")
    assert ours is not None and theirs is not None
    for field in ("hf_hub_id", "num_classes", "input_size", "mean", "std", "crop_pct", "interpolation", "license"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_default_tag_is_that_of_timm(size: str) -> None:
    ours, theirs = (timm.get_pretrained_cfg(f"vit_{va}{size}_patch16_224") for va in ("va_", ""))
    assert ours is not None and theirs is not None
    assert ours.tag == theirs.tag
