"""Halo attention against loops that follow the definition and know no padding, and against a recorded case."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import load, normal_input, relative_error, weights
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import HaloAttention, HaloAttention2d, halo_attention, halo_fused, softmax_attention
from vizattn.attention import halo as halo_module


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def naive_halo(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int],
    extra_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One query at a time: (B, h, H', W', d) -> (B, h, H', W', e). `sizes`: block, halo, stride."""
    block, halo, stride = sizes
    H, W, d = key.shape[2:]
    window = block + 2 * halo
    rows = []
    for i in range(0, H, stride):
        for j in range(0, W, stride):
            q = query[:, :, i // stride, j // stride]
            scores, values = [], []
            top, left = i // block * block - halo, j // block * block - halo
            for y in range(max(top, 0), min(top + window, H)):
                for x in range(max(left, 0), min(left + window, W)):
                    position = tables[0][y - i + halo + window - 1] + tables[1][x - j + halo + window - 1]
                    scores.append((q * (key[:, :, y, x] * d**-0.5 + position)).sum(-1))
                    values.append(value[:, :, y, x])
            for e in range(0 if extra_kv is None else extra_kv[0].shape[2]):
                scores.append((q * extra_kv[0][:, :, e]).sum(-1) * d**-0.5)  # type: ignore[index]
                values.append(extra_kv[1][:, :, e].expand_as(value[:, :, 0, 0]))  # type: ignore[index]
            share = torch.stack(scores, -1).softmax(-1)
            rows.append((share.unsqueeze(-1) * torch.stack(values, 2)).sum(2))
    return torch.stack(rows, 2).unflatten(2, (-(-H // stride), -(-W // stride)))


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 2),
    h=st.integers(1, 2),
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    half_block=st.integers(1, 2),
    halo=st.integers(0, 3),
    stride=st.integers(1, 2),
    E=st.integers(0, 2),
    chunk=st.sampled_from([1, 200, 1 << 18]),
    seed=st.integers(0, 99),
)
def test_function_equals_the_definition(
    B: int, h: int, H: int, W: int, half_block: int, halo: int, stride: int, E: int, chunk: int, seed: int
) -> None:
    d, e, block = 3, 4, half_block * 2
    query = draw(seed, B, h, -(-H // stride), -(-W // stride), d)
    key, value = draw(seed + 1, B, h, H, W, d), draw(seed + 2, B, h, H, W, e)
    positions = 2 * (block + 2 * halo) - 1
    tables = (draw(seed + 3, positions, d), draw(seed + 4, positions, d))
    extra = (draw(seed + 5, 1, h, E, d), draw(seed + 6, 1, h, E, e)) if E else None
    inputs = [query, key, value, *tables, *(extra or ())]
    expected = naive_halo(query, key, value, tables, (block, halo, stride), extra)

    def ours() -> Tensor:
        return halo_attention(query, key, value, *tables, block, halo, stride, extra_kv=extra)

    with mock.patch.object(halo_fused, "CHUNK", chunk):
        by_rows = ours()
    with mock.patch.object(halo_module, "_by_rows", lambda _: False):
        at_once = ours()
    cotangent = draw(seed + 7, *expected.shape).detach()
    expected_grads = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True, materialize_grads=True)
    for output in (by_rows, at_once):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(output, inputs, cotangent, allow_unused=True, materialize_grads=True)
        for grad, expected_grad in zip(grads, expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


def test_all_ways_to_derive_agree() -> None:
    """Backward, twice, forward, by torch.func, and inside autocast."""
    inputs = [draw(i, 1, 2, 3, 4, 3) for i in range(3)] + [draw(i, 7, 3) for i in (3, 4)]

    def function(*inputs: Tensor) -> Tensor:
        return halo_attention(*inputs, block_size=2, halo_size=1)

    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs)
    expected = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs)
    by_func = torch.func.grad(lambda *x: function(*x).pow(2).sum(), argnums=tuple(range(5)))(*inputs)
    torch.testing.assert_close(by_func, expected)
    key = inputs[1].detach()
    grads = torch.autograd.grad(function(inputs[0], key, *inputs[2:]).pow(2).sum(), [inputs[0], *inputs[2:]])
    torch.testing.assert_close(grads, (expected[0], *expected[2:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = [draw(i, 1, 2, 9, 10, 8) for i in range(3)] + [draw(i, 15, 8) for i in (3, 4)]
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output, expected = halo_attention(*narrow, 4, 2), halo_attention(*inputs, 4, 2)
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(output.float().pow(2).sum(), narrow)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.pow(2).sum(), inputs)):
        assert (grad.double() - expected_grad).norm() < 0.05 * expected_grad.norm()


@pytest.mark.parametrize("odd", [1, 3])
def test_odd_blocks(odd: int) -> None:
    query, key, value = (draw(i, 1, 2, 5, 4, 3) for i in range(3))
    tables = (draw(3, 2 * (odd + 2) - 1, 3), draw(4, 2 * (odd + 2) - 1, 3))
    expected = naive_halo(query, key, value, tables, (odd, 1, 1))
    torch.testing.assert_close(halo_attention(query, key, value, *tables, odd, 1), expected, rtol=1e-10, atol=1e-12)


def test_recorded_layer_without_masking() -> None:
    case = load("timm_halo_attn_d64_h4_b8_halo3")
    state = weights(case)
    layer = HaloAttention2d(64, 4, block_size=8, halo_size=3, mask_padding=False, dtype=torch.float64)
    layer.load_state_dict(
        {
            "q.weight": state["q.weight"].flatten(1),
            "kv.weight": state["kv.weight"].flatten(1),
            "height_rel": state["pos_embed.height_rel"],
            "width_rel": state["pos_embed.width_rel"],
        }
    )
    assert sum(p.numel() for p in layer.parameters()) == case["params"]
    x = normal_input("input:32x32", tuple(case["input_shape"])).requires_grad_()
    output = layer(x)
    (grad,) = torch.autograd.grad(output.pow(2).mean(), x)
    expected = case["float64"]
    assert list(output.shape) == case["output_shape"]
    assert relative_error(output.flatten(1)[:, :16], expected["output_first16"]) < 1e-8
    assert relative_error(output.flatten(1).sum(1), expected["output_sum"]) < 1e-8
    assert relative_error(output.flatten(1).norm(dim=1), expected["output_l2"]) < 1e-8
    assert relative_error(grad.norm(), expected["input_grad_l2"]) < 1e-8
    assert relative_error(grad.flatten()[:8], expected["input_grad_first8"]) < 1e-8

    layer.mask_padding = True  # must show at the border and only there
    difference = (layer(x) - output).abs().amax(dim=(0, 1))
    assert difference[8:24, 8:24].max() == 0
    assert difference[0].min() > 1e-3


@pytest.mark.parametrize(
    ("stride", "ratio", "size"), [(1, 1.0, (8, 8)), (2, 2.5, (7, 5)), (1, 3.0, (1, 1)), (2, 1, (9, 4))]
)
def test_map_module_equals_the_definition(stride: int, ratio: float, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = HaloAttention2d(8, 2, 4, 1, ratio, stride, dtype=torch.float64)
    x = draw(1, 2, 8, *size)
    pixels = x.permute(0, 2, 3, 1)
    query = layer.q(pixels)[:, ::stride, ::stride].unflatten(-1, (2, 4)).permute(0, 3, 1, 2, 4)
    kv = layer.kv(pixels).unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4)
    expected = naive_halo(query, kv[..., :4], kv[..., 4:], (layer.height_rel, layer.width_rel), (4, 1, stride))
    expected = expected.permute(0, 1, 4, 2, 3).flatten(1, 2)
    assert expected.shape[1] == int(8 * ratio)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("E", [0, 2])
def test_token_module_equals_the_definition(prefix: int, E: int) -> None:
    torch.manual_seed(0)
    H, W = 5, 6
    layer = HaloAttention(8, 2, qkv_bias=True, qk_norm=True, block_size=4, halo_size=1, dtype=torch.float64)
    x = draw(1, 2, prefix + H * W, 8)
    extra = layer.project_kv(draw(2, 1, E, 8)) if E else None
    query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    query, key = layer.q_norm(query), layer.k_norm(key)
    parts = ((query, key, value), extra or (key[:, :, :0], value[:, :, :0]))
    others = tuple(
        torch.cat([own[:, :, :prefix], more.expand(2, -1, -1, -1)], 2) for own, more in zip(parts[0][1:], parts[1])
    )
    maps = [part[:, :, prefix:].unflatten(2, (H, W)) for part in parts[0]]
    tables = (layer.height_rel, layer.width_rel)
    patches = naive_halo(maps[0], maps[1], maps[2], tables, (4, 1, 1), (others[0], others[1])).flatten(2, 3)
    everything = [torch.cat([own, more.expand(2, -1, -1, -1)], 2) for own, more in zip(parts[0][1:], parts[1])]
    first = softmax_attention(query[:, :, :prefix], everything[0], everything[1])
    expected = layer.proj(torch.cat([first, patches], 2).transpose(1, 2).flatten(2))
    output = layer(x, (H, W), extra)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, *layer.parameters()]
    for grad, expected_grad in zip(
        *(torch.autograd.grad(y.pow(2).sum(), inputs, retain_graph=True) for y in (output, expected))
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = HaloAttention2d(8, 2, 4, 1, attn_drop=0.5)
    x = torch.randn(1, 8, 6, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_mistakes() -> None:
    with pytest.raises(VizattnError, match="stride 2 must divide block_size 5"):
        HaloAttention2d(8, 2, block_size=5, stride=2)
    with pytest.raises(VizattnError, match="values of 20 cannot be split into 8 heads"):
        HaloAttention2d(8, 8, value_ratio=2.5)
    with pytest.raises(VizattnError, match="10 cannot be split into 3 heads"):
        HaloAttention(10, 3)
    with pytest.raises(VizattnError, match="halo_size 0 or more, not 8 and -1"):
        HaloAttention(8, 2, halo_size=-1)
