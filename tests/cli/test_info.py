"""`vizattn info`."""

from __future__ import annotations

import json

import pytest

import vizattn
from vizattn.cli import main
from vizattn.cli.info import describe_adapter, describe_backbone

Capture = pytest.CaptureFixture[str]


def test_our_backbone() -> None:
    facts = describe_backbone("vit_va_nano_patch4_32")
    assert facts["parameters"] == 687_316 and facts["classes"] == 52 and facts["width"] == 96
    assert facts["weights"] == "packaged" and facts["tags"]
    # 6 blocks of 12 * 96^2 weights on 65 tokens and 2 * 65^2 * 96 in attention; patches, head.
    macs = 6 * (65 * 12 * 96**2 + 2 * 65**2 * 96) + 64 * 48 * 96 + 96 * 52
    assert facts["gmacs"] == pytest.approx(macs / 1e9, rel=1e-3)
    assert facts["preprocessing"]["input_size"] == [3, 32, 32]
    assert facts["features"][0] == {"module": "blocks.0", "channels": 96, "stride": 4}
    assert set(facts["adapters"]) == set(vizattn.list_adapters())
    assert all(facts["adapters"][name] is None for name in ("linear_probe", "vpt", "hst", "efficient_probing"))


@pytest.mark.parametrize(("name", "prompts"), [("nat_nano", True), ("efficientvit_va_nano", False)])
def test_our_pyramids_tell_which_adapters_fit(name: str, prompts: bool) -> None:
    adapters = describe_backbone(name)["adapters"]
    assert all(adapters[method] is None for method in ("linear_probe", "full", "apla"))
    assert (adapters["vpt"] is None) == prompts
    # 32 queries do not divide every width
    assert adapters["efficient_probing"] is None or "Closest that fits: 1 * 28." in adapters["efficient_probing"]
    assert "one grid. These work on it: apla, efficient_probing, full, linear_probe, side_tuning" in adapters["hst"]
    assert prompts or "takes no tokens besides the image's own" in adapters["vpt"]


def test_backbone_of_timm_tells_why_an_adapter_does_not_fit() -> None:
    facts = describe_backbone("resnet18.a1_in1k")
    assert facts["weights"] == "released" and "a1_in1k" in facts["tags"]
    assert facts["adapters"]["linear_probe"] is None
    assert "resnet" in facts["adapters"]["vpt"].lower()


def test_backbone_without_a_head() -> None:
    facts = describe_backbone("vit_base_patch16_siglip_224")
    assert facts["classes"] == 0 and facts["gmacs"] > 17
    assert "no head" in facts["adapters"]["linear_probe"] and facts["adapters"]["vpt"] is None


def test_adapter() -> None:
    facts = describe_adapter("vpt")
    options = {row["option"]: row for row in facts["options"]}
    assert options["num_tokens"]["default"] == 50 and options["num_tokens"]["help"]
    assert "2203.12119" in facts["source"]
    assert facts["why_not_merged"]


@pytest.mark.parametrize("name", ["vit_va_nano_patch4_32", "apla", "linear_probe"])
def test_text_and_json(name: str, capsys: Capture) -> None:
    assert main(["info", name]) == 0
    assert name in capsys.readouterr().out
    assert main(["info", name, "--json"]) == 0
    assert name in json.loads(capsys.readouterr().out).values()


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("vit_va_nano_patch4_23", "vit_va_nano_patch4_32"),
        ("aplaa", "apla"),
        ("vit_base_patch16_224.mea", "mae"),
    ],
)
def test_unknown_names(name: str, closest: str, capsys: Capture) -> None:
    assert main(["info", name]) == 2
    assert f"'{closest}'" in capsys.readouterr().err
