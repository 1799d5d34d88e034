"""Window attention against one softmax over all tokens, masked by the definition."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import WindowAttention, native, window_native
from vizattn.attention.window import merge_windows, partition_windows, window_mask


def windows_of(size: int, window: int, shift: bool) -> list[int]:
    """The window of each position along an axis."""
    start = window // 2 if shift and size > window else 0
    return [(i - start) // window for i in range(size)]


def naive(module: WindowAttention, x: Tensor, grid: tuple[int, int], extra: Tensor | None = None) -> Tensor:
    """Every query and key in turn: which bias they have, and whether they share a window. Prefix tokens see all."""
    B, N, C = x.shape
    (H, W), (wh, ww), h = grid, module.window_size, module.num_heads
    P, d = N - H * W, C // module.num_heads
    rows, columns = windows_of(H, wh, module.shift), windows_of(W, ww, module.shift)
    table = module.relative_position_bias_table
    E = 0 if extra is None else extra.shape[1]
    scores_bias = [[torch.zeros(h, dtype=x.dtype) for _ in range(N + E)] for _ in range(N)]
    for q in range(H * W):
        for k in range(H * W):
            (qy, qx), (ky, kx) = divmod(q, W), divmod(k, W)
            if rows[qy] != rows[ky] or columns[qx] != columns[kx]:
                scores_bias[P + q][P + k] = torch.full((h,), float("-inf"), dtype=x.dtype)
            elif table is not None:
                scores_bias[P + q][P + k] = table[(qy - ky + wh - 1) * (2 * ww - 1) + qx - kx + ww - 1]
    bias = torch.stack([torch.stack(row) for row in scores_bias]).permute(2, 0, 1)

    def heads(tokens: Tensor, part: int) -> Tensor:
        shift = 0 if module.qkv.bias is None else module.qkv.bias.chunk(3)[part]
        return (tokens @ module.qkv.weight.chunk(3)[part].T + shift).unflatten(-1, (h, d)).transpose(1, 2)

    tokens = x if extra is None else torch.cat([x, extra.expand(B, -1, -1)], dim=1)
    query, key, value = module.q_norm(heads(x, 0)), module.k_norm(heads(tokens, 1)), heads(tokens, 2)
    weights = (query @ key.transpose(-2, -1) / d**0.5 + bias).softmax(-1)
    return (weights @ value).transpose(1, 2).reshape(B, N, C) @ module.proj.weight.T + module.proj.bias


def drawn(module: WindowAttention) -> WindowAttention:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    wh=st.integers(1, 4),
    ww=st.integers(1, 4),
    P=st.integers(0, 2),
    E=st.integers(0, 2),
    shift=st.booleans(),
    bias=st.booleans(),
    learnt=st.booleans(),
    qk_norm=st.booleans(),
)
def test_equals_the_definition(
    B: int, H: int, W: int, wh: int, ww: int, P: int, E: int, shift: bool, bias: bool, learnt: bool, qk_norm: bool
) -> None:
    torch.manual_seed(H + 10 * W)
    module = drawn(
        WindowAttention(
            4, 2, window_size=(wh, ww), shift=shift, rel_pos_bias=bias, qk_norm=qk_norm, dtype=torch.float64
        )
    )
    if bias and not learnt:  # the fused kernel serves
        module.relative_position_bias_table.requires_grad_(False)  # type: ignore[union-attr]
    x = torch.randn(B, P + H * W, 4, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(1, E, 4, dtype=torch.float64, requires_grad=True) if E else None
    output = module(x, (H, W), None if extra is None else module.project_kv(extra))
    expected = naive(module, x, (H, W), extra)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)

    inputs = [t for t in (x, extra, *module.parameters()) if t is not None and t.requires_grad]
    cotangent = torch.randn_like(output)
    own, reference = (torch.autograd.grad((y * cotangent).sum(), inputs, allow_unused=True) for y in (output, expected))
    for a, b in zip(own, reference):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(native.library is None, reason="vizattn was installed without a C++ compiler")
@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    P=st.integers(0, 2),
    E=st.integers(0, 2),
    shift=st.booleans(),
    bias=st.booleans(),
    qk_norm=st.booleans(),
)
def test_the_compiled_library_equals_the_definition(
    H: int, W: int, window: tuple[int, int], P: int, E: int, shift: bool, bias: bool, qk_norm: bool
) -> None:
    torch.manual_seed(H + 10 * W)
    module = drawn(WindowAttention(32, 2, window_size=window, shift=shift, rel_pos_bias=bias, qk_norm=qk_norm))
    wide = copy.deepcopy(module).double()
    x, extra = torch.randn(2, P + H * W, 32), torch.randn(1, E, 32) if E else None
    with mock.patch.object(window_native, "attend_tiles", wraps=window_native.attend_tiles) as used:
        output = module(x, (H, W), None if extra is None else module.project_kv(extra))
        assert used.call_count == 1
    expected = naive(wide, x.double(), (H, W), None if extra is None else extra.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)
    cotangent = torch.randn_like(output)
    own = torch.autograd.grad((output * cotangent).sum(), list(module.parameters()), allow_unused=True)
    right = torch.autograd.grad((expected * cotangent).sum(), list(wide.parameters()), allow_unused=True)
    for (name, _), a, b in zip(module.named_parameters(), own, right):
        if b is not None:
            torch.testing.assert_close(
                a.double(), b, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_norms_put_in_later_and_hooks_are_seen() -> None:
    torch.manual_seed(0)
    module, x = WindowAttention(32, 2, window_size=3), torch.randn(1, 25, 32)
    before = module(x, (5, 5))
    module.q_norm.register_forward_hook(lambda _module, _inputs, output: 3 * output)
    hooked = module(x, (5, 5))
    assert not torch.allclose(hooked, before)
    with native.unused():
        torch.testing.assert_close(module(x, (5, 5)), hooked)


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_windows_are_put_back_together(shift: tuple[int, int]) -> None:
    x = torch.randn(2, 5, 7, 3)
    windows = partition_windows(x, (2, 4), shift)
    assert windows.shape == (2 * 3 * 2, 8, 3)
    assert torch.equal(merge_windows(windows, (5, 7), (2, 4), shift), x)


def test_no_mask_where_none_is_needed() -> None:
    assert window_mask((14, 21), (7, 7)) is None
    assert window_mask((14, 20), (7, 7)) is not None
    mask = window_mask((14, 14), (7, 7), (3, 3))
    assert mask is not None
    assert mask[0].all()
    assert not mask[1].all()


def test_tables_of_swin_fit() -> None:
    module = WindowAttention(96, 3, window_size=7)
    table = module.state_dict()["relative_position_bias_table"]
    assert table.shape == (169, 3)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        module = WindowAttention(8, 2, window_size=3, rel_pos_bias=bias, attn_drop=0.5)
        x = torch.randn(1, 25, 8)
        assert not torch.equal(module(x, (5, 5)), module(x, (5, 5)))
        module.eval()
        assert torch.equal(module(x, (5, 5)), module(x, (5, 5)))


def test_errors() -> None:
    with pytest.raises(VizattnError, match="10 cannot be split into 3 heads"):
        WindowAttention(10, 3)
    with pytest.raises(VizattnError, match="window_size of window attention must be at least 1, not 0"):
        WindowAttention(8, 2, window_size=0)
