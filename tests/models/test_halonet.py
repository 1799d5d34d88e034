"""What is special to HaloNet: it is timm's network but for what timm leaves undone, and its checkpoint filter."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import Tensor

import vizattn.attention.halo as halo
from vizattn import VizattnError, fuse
from vizattn.attention import HaloAttention2d
from vizattn.models import halonet

RENAMED = (
    (r"^stem\.conv1\.", "stem.0."),
    (r"^stages\.(\d)\.(\d)", r"stages.\1.blocks.\2"),
    ("conv1_1x1", "conv1"),
    ("conv3_1x1", "conv2"),
    ("self_attn", "attn"),
    (r"pos_embed\.", ""),
    ("post_attn", "norm"),
)


def test_network_is_that_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm lets padding take part, takes strided queries to be neighbors, and has 8 heads in the first stage."""
    torch.manual_seed(0)
    theirs = timm.create_model("halonet_h1", num_classes=7).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = timm.create_model("halonet_va_h1", num_classes=7, num_heads=(8, 8, 8, 8)).double().eval()
    state = {}
    for key, value in theirs.state_dict().items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        state[key] = value.flatten(1) if key.endswith((".q.weight", ".kv.weight")) else value
    ours.load_state_dict(state)
    for module in ours.modules():
        if isinstance(module, HaloAttention2d):
            module.mask_padding = False
    logits = halo._relative_logits
    monkeypatch.setattr(halo, "_relative_logits", lambda query, table, window, _stride: logits(query, table, window, 1))
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(600, 600), (96, 96), (512, 96), (33, 17)])
def test_maps_of_any_size(size: tuple[int, int]) -> None:
    """600 gives maps of 150, 75, 38 and 19, which blocks of 10 do not divide."""
    model = timm.create_model("halonet_va_h7", depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), final_dim=32).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-s // r) for s in size) for r in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


def test_pruning_takes_the_final_convolution_along() -> None:
    model = timm.create_model("halonet_va_h3", depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16)).eval()
    model.prune_intermediate_layers([1])
    model.reset_classifier(3, "avg")
    assert model.num_features == model.head_hidden_size == 24
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_fused_network_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = timm.create_model("halonet_va_nano").eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    torch.testing.assert_close(fuse(model)(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_checkpoints_of_ours(nest: object) -> None:
    model = timm.create_model("halonet_va_nano")
    state = model.state_dict()
    loaded: dict[str, Tensor] = halonet.checkpoint_filter_fn(nest(state), model)  # type: ignore[operator]
    model.load_state_dict(loaded, strict=True)


def test_checkpoints_of_another_size_are_refused() -> None:
    model = timm.create_model("halonet_va_nano")
    state = timm.create_model("halonet_va_nano", block_size=6).state_dict()
    with pytest.raises(VizattnError, match=r"of another shape .*height_rel \(15, 16\) instead of \(11, 16\)"):
        halonet.checkpoint_filter_fn(state, model)


def test_mistakes() -> None:
    with pytest.raises(VizattnError, match="need an entry a stage, not 3, 2 and 3"):
        timm.create_model("halonet_va_nano", depths=(1, 1))
    with pytest.raises(VizattnError, match="stem_stride must be 2 or 4, not 3"):
        timm.create_model("halonet_va_nano", stem_stride=3)
