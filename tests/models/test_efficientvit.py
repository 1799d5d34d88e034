"""What is special to EfficientViT: its stages at other sizes, its tables, and the layouts its weights come in."""

from __future__ import annotations

import pytest
import timm
import torch
from families import images
from reference import load, weights
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import native
from vizattn.layers import PooledNorm
from vizattn.models.efficientvit import EfficientViT, checkpoint_filter_fn


def m0() -> EfficientViT:
    return timm.create_model("efficientvit_va_m0", num_classes=1000)


@pytest.mark.parametrize("case", ["efficientvit_m0", "timm_efficientvit_m0"])
@pytest.mark.parametrize("nest", ["flat", "model", "state_dict"])
def test_both_layouts_in_every_nesting(case: str, nest: str) -> None:
    model = m0()
    state = weights(load(case))
    converted = checkpoint_filter_fn(state if nest == "flat" else {nest: state}, model)
    model.load_state_dict(converted, strict=True)
    assert torch.equal(checkpoint_filter_fn(model.state_dict(), model)["head.fc.weight"], model.head.fc.weight)


def test_matrices_are_convolutions_of_size_one() -> None:
    state = weights(load("efficientvit_m0"))
    flat = {key: value[:, :, 0, 0] if value.shape[-2:] == (1, 1) else value for key, value in state.items()}
    assert any(flat[key].ndim < state[key].ndim for key in state)
    expected, given = (checkpoint_filter_fn(x, m0()) for x in (state, flat))
    assert all(torch.equal(expected[key], given[key]) for key in expected)


def test_index_tables_are_dropped() -> None:
    state = weights(load("efficientvit_m0"))
    state["blocks1.0.mixer.m.attn.attention_bias_idxs"] = torch.zeros(49, 49, dtype=torch.long)
    m0().load_state_dict(checkpoint_filter_fn(state, m0()), strict=True)


def test_other_classes_and_channels_keep_the_rest() -> None:
    state = {"model": {key: value.float() for key, value in weights(load("efficientvit_m0")).items()}}
    model = timm.create_model("efficientvit_va_m0", num_classes=7, in_chans=1)
    converted = checkpoint_filter_fn(state, model)
    assert torch.equal(converted["head.norm.running_mean"], state["model"]["head.bn.running_mean"])


def test_tables_of_another_window_are_stretched() -> None:
    state = weights(load("efficientvit_m0"))
    model = timm.create_model("efficientvit_va_m0", window_sizes=(7, 7, 7))
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    table = model.stages[2].blocks[0].attn.attention_biases.view(4, 7, 7)
    old = state["blocks3.3.mixer.m.attn.attention_biases"].view(4, 4, 4)
    assert table.min() > old.min() - 0.1 and table.max() < old.max() + 0.1
    assert torch.corrcoef(torch.stack([table[:, 0, 0], old[:, 0, 0].float()]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([table[:, 6, 6], old[:, 3, 3].float()]))[0, 1] > 0.9


def test_weights_of_another_size_are_refused() -> None:
    with pytest.raises(VizattnError, match=r"do not fit this EfficientViT: .* missing .*of another shape"):
        checkpoint_filter_fn(weights(load("efficientvit_m4")), timm.create_model("efficientvit_va_m5"))


def windows_of(model: EfficientViT, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """(windows, height, width) that the attention of each stage sees for one image."""
    seen: list[tuple[int, ...]] = []
    for stage in model.stages:
        attn = stage.blocks[0].attn
        cascade = attn._cascade

        def record(x: Tensor, bias: Tensor, valid: Tensor | None, cascade=cascade) -> Tensor:  # type: ignore[no-untyped-def]
            seen.append(tuple(x.shape[:3]))
            return cascade(x, bias, valid)

        attn._cascade = record
    with torch.no_grad(), native.unused():
        model(images(size, batch=1))
    return seen


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), [(4, 7, 7), (1, 7, 7), (1, 4, 4)]),
        ((256, 128), [(6, 6, 4), (2, 4, 4), (1, 4, 2)]),
        ((512, 96), [(5, 7, 6), (3, 6, 3), (2, 4, 2)]),
        ((32, 32), [(1, 2, 2), (1, 1, 1), (1, 1, 1)]),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_windows_are_equal_and_no_larger_than_the_table(size: tuple[int, int], expected: list[tuple[int, ...]]) -> None:
    assert windows_of(m0().eval(), size) == expected


def test_the_norm_before_the_classifier_survives_a_reset() -> None:
    model = m0()
    model.head.norm.running_mean.fill_(3)
    model.reset_classifier(5)
    assert model.head.norm.running_mean.eq(3).all()
    assert model.eval()(images((64, 64))).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(images((64, 64))).shape == (2, 192, 1, 1)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(VizattnError, match="64 cannot be split into 5 heads"):
        timm.create_model("efficientvit_va_m0", num_heads=(5, 4, 4))


def test_norm_of_pooled_features() -> None:
    """That of torch, but a single image is normed by the running statistics."""
    ours, theirs = PooledNorm(6), torch.nn.BatchNorm2d(6)
    for norm in (ours, theirs):
        torch.manual_seed(0)
        for _ in range(3):
            x = 2 * torch.randn(4, 6, 1, 1) + 1
            y = norm(x)
    torch.testing.assert_close(y, theirs.train()(x), rtol=1e-6, atol=1e-6)
    assert ours.num_batches_tracked == 3
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    assert torch.equal(ours(x[:1]), ours.eval()(x[:1]))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
