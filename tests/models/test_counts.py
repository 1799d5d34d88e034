"""Parameters and multiply-adds of every size are those of its paper, within one in a hundred."""

from __future__ import annotations

import pytest

from vizattn.cli.backbones import build_empty, gmacs

#: name -> (parameters in millions, multiply-adds of one image in thousand millions), at the native size
PUBLISHED: dict[str, tuple[float, float]] = {
    # arXiv:2312.08874 (with one decimal: 1.2 of tiny is 1.17)
    "deit_agent_tiny": (6.0, 1.17),
    "deit_agent_small": (22.7, 4.4),
    "deit_agent_base": (87.2, 17.5),
    "agent_pvt_tiny": (11.57, 1.99),
    "agent_pvt_small": (20.64, 3.96),
    "agent_pvt_medium": (35.92, 7.00),
    "agent_pvt_large": (48.74, 10.34),
    "agent_swin_tiny": (28.90, 4.50),
    "agent_swin_small": (49.67, 8.70),
    "agent_swin_base": (88.10, 15.4),
    "agent_cswin_tiny": (20.46, 4.29),
    "agent_cswin_small": (32.81, 6.74),
    "agent_cswin_base": (73.25, 14.87),
    # arXiv:2303.08810, table 2 and section 4.4, with the digits of the release
    "biformer_tiny": (13.14, 2.2),
    "biformer_small": (25.54, 4.46),
    "biformer_base": (56.80, 9.76),
    "biformer_stl": (28.37, 4.57),
    # arXiv:2305.07027, table 2, with one digit more
    "efficientvit_va_m0": (2.35, 0.079),
    "efficientvit_va_m1": (2.98, 0.167),
    "efficientvit_va_m2": (4.19, 0.201),
    "efficientvit_va_m3": (6.90, 0.263),
    "efficientvit_va_m4": (8.80, 0.299),
    "efficientvit_va_m5": (12.47, 0.522),
    # arXiv:2103.12731, tables 2 and 3, at the size of each; H5 and H7 have fewer multiply-adds here, see the card
    "halonet_va_h0": (5.5, 2.35),
    "halonet_va_h1": (8.1, 2.99),
    "halonet_va_h2": (9.4, 3.31),
    "halonet_va_h3": (11.8, 6.18),
    "halonet_va_h4": (19.1, 12.0),
    "halonet_va_h6": (43.4, 53.2),
    # arXiv:2501.16182, table 1 and table 3
    "l2vit_tiny": (28.60, 4.69),
    "l2vit_small": (50.20, 8.98),
    "l2vit_base": (88.58, 15.81),
    # arXiv:2204.07143, table 1; arXiv:2209.15001, tables 2 and 3
    "nat_mini": (19.98, 2.69),
    "nat_tiny": (27.9, 4.30),
    "nat_small": (50.7, 7.77),
    "nat_base": (89.8, 13.7),
    "dinat_mini": (19.98, 2.69),
    "dinat_tiny": (27.9, 4.30),
    "dinat_small": (50.7, 7.77),
    "dinat_base": (89.8, 13.7),
    "dinat_large": (200.9, 30.5),
    "dinat_large_384": (200.9, 89.5),
    "dinat_s_tiny": (28.3, 4.49),
    "dinat_s_small": (49.6, 8.74),
    "dinat_s_base": (87.8, 15.4),
    "dinat_s_large": (196.5, 34.5),
    # arXiv:2106.10270, table 2 (parameters); multiply-adds as timm's results list them
    "vit_va_tiny_patch16_224": (5.72, 1.26),
    "vit_va_small_patch16_224": (22.05, 4.61),
    "vit_va_base_patch16_224": (86.57, 17.58),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts(name: str) -> None:
    millions, giga = PUBLISHED[name]
    model = build_empty(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert gmacs(model, model.default_cfg["input_size"]) == pytest.approx(giga, rel=0.01)
