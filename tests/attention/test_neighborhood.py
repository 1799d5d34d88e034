"""Neighborhood attention against loops over its definition, in outputs and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vizattn import VizattnError
from vizattn.attention import NeighborhoodAttention, na1d, na2d, na3d, neighborhood
from vizattn.attention import neighborhood_fused as fused
from vizattn.attention.neighborhood import fitting_axis
from vizattn.attention.neighborhood_dense import attend_dense
from vizattn.attention.neighborhood_plain import attend_plain
from vizattn.attention.neighborhood_tiles import Axis

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


def window(i: int, L: int, k: int, s: int, dilation: int, causal: bool) -> list[tuple[int, int]]:
    """The (position, offset in steps of the dilation) of the keys of query `i` of an axis."""
    g, j = i % dilation, i // dilation
    length = len(range(g, L, dilation))
    if causal:
        leader = min(j // s * s + s - 1, length - 1)
        keys = range(max(leader - k + 1, 0), min(j + 1, length))
    else:
        leader = min(j // s * s + s // 2, length - 1)
        start = min(max(leader - k // 2, 0), length - k)
        keys = range(start, start + k)
    return [(g + dilation * t, t - j) for t in keys]


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: list[tuple[int, int, int, bool]],
    rpb: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    centre: list[int] | None = None,
) -> Tensor:
    """One query at a time: its keys, one by one; `centre` of the table of biases, if it is not that of the windows."""
    grid = query.shape[1:-2]
    centre = [k - 1 for k, *_ in options] if centre is None else centre
    rows = []
    for position in itertools.product(*map(range, grid)):
        scores, values = [], []
        q = query[(slice(None), *position)]
        for choice in itertools.product(*[window(i, L, *o) for i, L, o in zip(position, grid, options)]):
            where = (slice(None), *[p for p, _ in choice])
            score = (q * key[where]).sum(-1) / q.shape[-1] ** 0.5
            if rpb is not None:
                score = score + rpb[(slice(None), *[c + offset for c, (_, offset) in zip(centre, choice)])]
            scores.append(score)
            values.append(value[where])
        for e in range(0 if extra is None else extra[0].shape[1]):
            assert extra is not None
            scores.append((q * extra[0][:, e]).sum(-1) / q.shape[-1] ** 0.5)
            values.append(extra[1][:, e])
        weights = torch.stack(scores).softmax(dim=0).unsqueeze(-1)
        rows.append((weights * torch.stack(values)).sum(0))
    return torch.stack(rows, dim=1).unflatten(1, grid)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(outputs: list[Tensor], expected: Tensor, inputs: list[Tensor]) -> None:
    cotangent = draw(99, *expected.shape).detach()
    expected_grads = torch.autograd.grad(expected, inputs, cotangent, retain_graph=True)
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
        for grad, expected_grad in zip(grads, expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@st.composite
def cases(draw: Any, axes: int) -> tuple[tuple[int, ...], list[tuple[int, int, int, bool]]]:
    """Sizes and options of grids: borders, sizes that nothing divides, even windows."""
    grid, options = [], []
    for _ in range(axes):
        k = draw(st.integers(2, {1: 8, 2: 4, 3: 2}[axes]))
        dilation = draw(st.integers(1, 4 - axes))
        grid.append(k * dilation + draw(st.integers(0, {1: 50, 2: 5, 3: 1}[axes])))
        options.append((k, draw(st.integers(1, k)), dilation, draw(st.booleans())))
    return tuple(grid), options


@contextmanager
def tiles_of(size: int | None, chunk: int) -> Iterator[None]:
    """Tiles of so many queries along each axis, if not None, and portions of so many scores."""

    def sizes(axes: tuple[Axis, ...]) -> tuple[int, ...]:
        return tuple(min(size or 1, -(-axis.length // axis.dilation)) for axis in axes)

    def forget() -> None:
        fused._tables.cache_clear()
        fused._index.cache_clear()

    forget()
    chosen = sizes if size else fused.tile_sizes
    with mock.patch.object(fused, "CHUNK", chunk), mock.patch.object(fused, "tile_sizes", chosen):
        yield
    forget()


def check(case: Any, B: int, E: int, bias: bool, chunk: int, tile: int | None, seed: int) -> None:
    grid, options = case
    h, d = 2, 3
    query, key, value = (draw(seed + i, B, *grid, h, d) for i in range(3))
    rpb = draw(seed + 3, h, *(2 * k - 1 for k, *_ in options)) if bias else None
    extra = (draw(seed + 4, B, E, h, d), draw(seed + 5, B, E, h, d)) if E else None
    inputs = [query, key, value, *([rpb] if rpb is not None else []), *(extra or ())]
    expected = naive(query, key, value, options, rpb, extra)
    kernel_size, stride, dilation, is_causal = (list(option) for option in zip(*options))
    outputs = []
    with tiles_of(tile, chunk):
        for backend in ("auto", "tiled", "reference"):
            output = FUNCTIONS[len(grid)](
                query,
                key,
                value,
                kernel_size,
                stride=stride,
                dilation=dilation,
                is_causal=is_causal,
                rpb=rpb,
                additional_keys=extra[0] if extra else None,
                additional_values=extra[1] if extra else None,
                backend=backend,
            )
            outputs.append(output)
        qkv = torch.stack([query, key, value], dim=-3).flatten(1, len(grid))
        if extra:
            qkv = torch.cat([torch.stack([extra[0], extra[0], extra[1]], dim=-3), qkv], dim=1)
        axes = tuple(Axis(L, *option, option[0] - 1) for L, option in zip(grid, options))
        outputs.append(attend_plain(qkv, rpb, axes, d**-0.5).unflatten(1, grid))
        outputs.append(fused.attend_fused(rpb, axes, d**-0.5, qkv).unflatten(1, grid))
        outputs.append(attend_dense(rpb, axes, d**-0.5, qkv[:, E:, 0], qkv[:, :, 1], qkv[:, :, 2]).unflatten(1, grid))
        assert_same(outputs, expected, inputs)


options_of_all = {
    "E": st.sampled_from([0, 2]),
    "bias": st.booleans(),
    "tile": st.sampled_from([None, 1, 2, 3]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=6, deadline=None)
@given(case=cases(1), B=st.integers(1, 2), chunk=st.sampled_from([1, 1 << 17]), **options_of_all)
def test_1d_equals_the_definition(
    case: Any, B: int, E: int, bias: bool, chunk: int, tile: int | None, seed: int
) -> None:
    check(case, B, E, bias, chunk, tile, seed)


@settings(max_examples=8, deadline=None)
@given(case=cases(2), B=st.integers(1, 2), chunk=st.sampled_from([1, 3000, 1 << 17]), **options_of_all)
def test_2d_equals_the_definition(
    case: Any, B: int, E: int, bias: bool, chunk: int, tile: int | None, seed: int
) -> None:
    check(case, B, E, bias, chunk, tile, seed)


@settings(max_examples=3, deadline=None)
@given(case=cases(3), B=st.integers(1, 2), chunk=st.sampled_from([1, 1 << 17]), **options_of_all)
def test_3d_equals_the_definition(
    case: Any, B: int, E: int, bias: bool, chunk: int, tile: int | None, seed: int
) -> None:
    check(case, B, E, bias, chunk, tile, seed)


@settings(max_examples=8, deadline=None)
@given(
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    P=st.integers(0, 2),
    E=st.integers(0, 2),
    k=st.integers(2, 5),
    dilation=st.integers(1, 4),
    qk_norm=st.booleans(),
    bias=st.booleans(),
)
def test_module_equals_the_definition(
    H: int, W: int, P: int, E: int, k: int, dilation: int, qk_norm: bool, bias: bool
) -> None:
    """On maps of any size: small ones lower the dilation, then the window, whose biases stay those of the offsets."""
    torch.manual_seed(0)
    B, h, d = 2, 2, 3
    module = NeighborhoodAttention(
        6, h, qkv_bias=True, qk_norm=qk_norm, kernel_size=k, dilation=dilation, rel_pos_bias=bias, dtype=torch.float64
    )
    x, extra = draw(1, B, P + H * W, 6), (draw(2, 1, h, E, d), draw(3, 1, h, E, d))
    query, key, value = module.qkv(x).unflatten(-1, (3, h, d)).unbind(2)
    query, key = module.q_norm(query), module.k_norm(key)
    added = [e.transpose(1, 2).expand(B, -1, -1, -1) for e in extra]
    options = []
    for L in (H, W):
        window_size = min(k, L)
        fits = [r for r in range(1, dilation + 1) if window_size * r <= L]
        options.append((window_size, 1, max(fits, default=1), False))
    patches = naive(
        *(t[:, P:].unflatten(1, (H, W)) for t in (query, key, value)),
        options,
        module.rpb,
        tuple(torch.cat([a, t[:, :P]], dim=1) for a, t in zip(added, (key, value))),  # type: ignore[arg-type]
        [k - 1, k - 1],
    )
    keys, values = (torch.cat([a, t], dim=1).transpose(1, 2) for a, t in zip(added, (key, value)))
    prefix = (query[:, :P].transpose(1, 2) @ keys.transpose(-2, -1) / d**0.5).softmax(-1) @ values
    mixed = torch.cat([prefix.transpose(1, 2), patches.flatten(1, 2)], dim=1).flatten(2)
    expected = mixed @ module.proj.weight.T + module.proj.bias
    output = module(x, (H, W), extra if E else None)
    inputs = [x, *(extra if E else ()), *(p for p in module.parameters())]
    assert_same([output], expected, inputs)


def test_tiles_of_repetitions_only() -> None:
    """Of 9 positions, dilation 2 makes classes of 5 and 4: by tiles of 2, the last one of the second has no query."""
    check(((9, 5), [(4, 1, 2, False), (3, 1, 1, False)]), 1, 0, True, 1 << 17, 2, 0)
    check(((5, 9), [(3, 1, 1, False), (4, 1, 2, False)]), 2, 2, True, 1 << 17, 2, 0)


def test_small_maps_lower_the_dilation_then_the_window() -> None:
    assert fitting_axis(56, 7, 1, 8, False)[:4] == (56, 7, 1, 8)
    assert fitting_axis(55, 7, 1, 8, False)[:4] == (55, 7, 1, 7)
    assert fitting_axis(7, 7, 1, 8, False)[:4] == (7, 7, 1, 1)
    assert fitting_axis(5, 7, 6, 8, False)[:4] == (5, 5, 5, 1)
    assert fitting_axis(1, 7, 1, 8, False)[:4] == (1, 1, 1, 1)


def test_windows_are_shifted_inward_at_borders() -> None:
    """Every token sees exactly the 7 x 7 tokens of the nearest window inside of the map."""
    query = torch.zeros(1, 9, 9, 1, 81, dtype=torch.float64)
    value = torch.eye(81, dtype=torch.float64).view(1, 9, 9, 1, 81)
    seen = na2d(query, query, value, 7).view(9, 9, 9, 9) * 49
    for y, x in itertools.product(range(9), range(9)):
        top, left = min(max(y - 3, 0), 2), min(max(x - 3, 0), 2)
        expected = torch.zeros(9, 9, dtype=torch.float64)
        expected[top : top + 7, left : left + 7] = 1
        torch.testing.assert_close(seen[y, x], expected)


def test_blocks_when_the_stride_is_the_window() -> None:
    query, key, value = (draw(i, 2, 8, 12, 2, 3) for i in range(3))

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(2, (3, 4)).unflatten(1, (2, 4)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    expected = torch.nn.functional.scaled_dot_product_attention(blocks(query), blocks(key), blocks(value))
    output = na2d(query, key, value, 4, stride=4)
    torch.testing.assert_close(blocks(output), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_memory_grows_with_tokens_only(grad: bool) -> None:
    """No copy of the keys for each query (49 each): nothing exceeds what a row of tiles needs."""
    H, h, d, k = 48, 2, 16, 7
    query, key, value = (torch.randn(1, H, H, h, d, requires_grad=grad) for _ in range(3))
    rpb = torch.randn(h, 2 * k - 1, 2 * k - 1, requires_grad=grad)
    na2d(query, key, value, k, rpb=rpb)  # tables that are kept
    with torch.profiler.profile(profile_memory=True) as profile:
        output = na2d(query, key, value, k, rpb=rpb)
        if grad:
            output.sum().backward()
    allocated = [e.self_cpu_memory_usage for e in profile.events()]  # type: ignore[union-attr]
    assert max(allocated) > 0
    # Tiles of 8 x 4 queries see 14 rows of 10 columns; keys and values, of this row and the last, are one allocation.
    assert max(allocated) <= 4 * (14 / H) * (10 / 4) * H * H * h * d * 4


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_small_maps_are_masked_where_biases_get_no_gradient(
    rel_pos_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention(16, 2, kernel_size=3, rel_pos_bias=rel_pos_bias).double().eval()
    x, extra = torch.randn(2, 1 + 5 * 6, 16).double(), tuple(torch.randn(2, 2, 3, 8).double())
    with torch.no_grad():
        masked = module(x, (5, 6), (extra[0][None], extra[1][None]))
    monkeypatch.setattr(neighborhood, "DENSE_TOKENS", 0)
    monkeypatch.setattr(neighborhood, "attend_dense", None)
    torch.testing.assert_close(masked, module(x, (5, 6), (extra[0][None], extra[1][None])).detach())


def test_maps_that_tiles_are_better_for() -> None:
    with mock.patch.object(neighborhood, "attend_fused", wraps=fused.attend_fused) as by_tiles, torch.no_grad():
        for shape, kernel, expected in (((14, 14), 7, 0), ((28, 28), 7, 1), ((300,), 7, 1)):
            function = {1: na1d, 2: na2d}[len(shape)]
            function(*(torch.randn(1, *shape, 1, 4) for _ in range(3)), kernel)
            assert by_tiles.call_count == expected, shape
            by_tiles.reset_mock()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 9, 10, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 9, 9, requires_grad=True)
    output = na2d(*inputs, 5, rpb=rpb)
    assert output.dtype == dtype
    wide = [t.detach().double().requires_grad_() for t in (*inputs, rpb)]
    expected = na2d(*wide[:3], 5, rpb=wide[3])
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(output.float().pow(2).sum(), [*inputs, rpb])
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.pow(2).sum(), wide)):
        assert (grad.double() - expected_grad).norm() < 0.05 * expected_grad.norm()
    assert grads[3].dtype == torch.float32


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("row", [0, 11])
def test_scores_whose_exponentials_leave_the_range_of_floats(sign: int, row: int) -> None:
    """From one row on, all scores are near 2,000, or -2,000: their exponentials are infinite, or 0."""
    query, key, value = (draw(i, 1, 30, 5, 2, 4).float().detach() for i in range(3))
    query[:, row:, ..., 0], key[..., 0] = 40, sign * 100
    inputs = [x.requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = na2d(*inputs, 3, backend="tiled"), naive(*wide, [(3, 1, 1, False)] * 2)
    with mock.patch.object(neighborhood, "DENSE_TOKENS", 0):
        outputs = [output, na2d(*inputs, 3)]
    cotangent = draw(9, *expected.shape).detach()
    expected_grads = torch.autograd.grad(expected, wide, cotangent)
    for output in outputs:
        torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)  # scores are exact to 2e-4
        for grad, expected_grad in zip(torch.autograd.grad(output, inputs, cotangent.float()), expected_grads):
            assert (grad.double() - expected_grad).norm() < 1e-3 * expected_grad.norm()


def test_the_mean_of_many_large_values_fits_half_precision() -> None:
    query = torch.zeros(1, 20, 20, 1, 4, dtype=torch.float16)
    value = torch.full_like(query, 400)
    assert torch.allclose(na2d(query, query, value, 19), value)


@pytest.mark.parametrize(
    ("backend", "message"), [("tiled", "automatic differentiation"), ("auto", "derivative for .* not implemented")]
)
def test_second_derivatives_are_refused(backend: str, message: str) -> None:
    query = torch.randn(1, 5, 5, 1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=message):
        (grad,) = torch.autograd.grad(na2d(query, query, query, 3, backend=backend).sum(), query, create_graph=True)
        grad.sum().backward()


def test_all_ways_of_running_agree() -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention(8, 2, kernel_size=3, dilation=2).eval()
    x = torch.randn(2, 1 + 7 * 6, 8)
    expected = module(x, (7, 6))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, (7, 6)), expected)
    torch.testing.assert_close(torch.jit.script(module)(x, (7, 6)), expected)
    torch.testing.assert_close(torch.export.export(module, (x, (7, 6))).module()(x, (7, 6)), expected)
    with torch.inference_mode():
        torch.testing.assert_close(module(x, (7, 6)), expected)
    assert module.to("meta")(x.to("meta"), (7, 6)).shape == expected.shape


def test_dropout_acts_in_training_only() -> None:
    module = NeighborhoodAttention(8, 2, kernel_size=3, attn_drop=0.5)
    x = torch.randn(1, 25, 8)
    assert not torch.equal(module(x, (5, 5)), module(x, (5, 5)))
    module.eval()
    assert torch.equal(module(x, (5, 5)), module(x, (5, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 1}, "na2d, axis 0: kernel_size must be at least 2, not 1"),
        ({"kernel_size": (3, 9)}, r"na2d, axis 1: kernel_size 9 times dilation 1 must fit into the length 8"),
        ({"kernel_size": 3, "dilation": (1, 3)}, "na2d, axis 1: kernel_size 3 times dilation 3 must fit"),
        ({"kernel_size": 3, "stride": 4}, "stride must be from 1 to the kernel size 3, not 4"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one value or 2"),
        ({"kernel_size": 3, "rpb": torch.zeros(2, 3, 3)}, r"rpb must have the shape \(2, 5, 5\), not \(2, 3, 3\)"),
        ({"kernel_size": 3, "backend": "tilde"}, "Unknown backend of na2d 'tilde'. Did you mean 'tiled'"),
        ({"kernel_size": 3, "backend": "natten"}, "'natten' cannot be used here: the tensors are not on CUDA"),
        ({"kernel_size": 3, "additional_keys": torch.zeros(1, 1, 2, 4)}, "go together"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    query = torch.zeros(1, 8, 8, 2, 4)
    with pytest.raises(VizattnError, match=message):
        na2d(query, query, query, **options)


def test_mistakes_of_shape_and_module() -> None:
    query = torch.zeros(1, 8, 8, 2, 4)
    with pytest.raises(VizattnError, match=r"na1d: query, key and value must have one shape \(B, X, heads, channels\)"):
        na1d(query, query, query, 3)
    one, two = torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, 2, 4)
    with pytest.raises(VizattnError, match=r"one shape \(1, E, 2, 4\), not \(1, 1, 2, 4\) and \(1, 2, 2, 4\)"):
        na2d(query, query, query, 3, additional_keys=one, additional_values=two)
    with pytest.raises(VizattnError, match="10 cannot be split into 3 heads"):
        NeighborhoodAttention(10, 3)
    with pytest.raises(VizattnError, match="stride must be from 1"):
        NeighborhoodAttention(8, 2, kernel_size=3, stride=4)


def test_backward_inside_autocast() -> None:
    torch.manual_seed(0)
    query, rpb = torch.randn(1, 5, 6, 2, 4, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = na2d(query, query, query, 3, rpb=rpb)
            grads.append(torch.autograd.grad(out.float().pow(2).sum(), [query, rpb]))
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-2, atol=2e-2)
