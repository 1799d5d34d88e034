"""The weights of each mechanism, queried from its map, against its real output in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vizattn import VizattnError, models
from vizattn.attention import ATTENTION, CrossShapedAttention, HaloAttention2d
from vizattn.attention import mechanism_maps as mechanism_maps
from vizattn.attention.maps import AttentionCall, AttentionMap, map_of

GRID, HEADS, DIM, BATCH = (6, 9), 2, 8, 2

#: name: class, options, whether it takes prefix tokens
MECHANISMS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "softmax": (ATTENTION["softmax"], {"qk_norm": True}, True),
    "window": (ATTENTION["window"], {"window_size": (4, 3)}, True),
    "window shifted": (ATTENTION["window"], {"window_size": 4, "shift": True, "rel_pos_bias": True}, True),
    "neighborhood": (ATTENTION["neighborhood"], {"kernel_size": 3}, True),
    "neighborhood dilated": (ATTENTION["neighborhood"], {"kernel_size": (3, 4), "dilation": (2, 2)}, True),
    "neighborhood strided": (ATTENTION["neighborhood"], {"kernel_size": 4, "stride": 3}, True),
    "neighborhood causal": (ATTENTION["neighborhood"], {"kernel_size": 3, "is_causal": (True, False)}, True),
    "halo": (ATTENTION["halo"], {"block_size": 4, "halo_size": 1}, True),
    "routing": (ATTENTION["bilevel_routing"], {"n_win": 4, "topk": 3}, True),
    "routing to all": (ATTENTION["bilevel_routing"], {"n_win": 2, "topk": 4}, True),
    "agent": (ATTENTION["agent"], {"num_agents": 9}, True),
    "linear": (ATTENTION["linear"], {"min_sum": 1.5}, True),
    "stripes": (CrossShapedAttention, {"split_size": 2}, False),
    "stripe of all": (CrossShapedAttention, {"num_branches": 1}, False),
    "softmax of BiFormer": (models.biformer.LePEAttention, {}, False),
}


def build(name: str) -> nn.Module:
    """The mechanism in float64 with random biases, the convolution of its values, which is no attention, silenced."""
    torch.manual_seed(1)
    kind, options, prefix = MECHANISMS[name]
    sizes = {"grid_size": GRID, "num_prefix_tokens": 2, "qkv_bias": True} if prefix else {}
    attn = kind(DIM, HEADS, **sizes, **options).double().eval()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.7)
    for module in attn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return attn


def make_input(name: str, grid: tuple[int, int] = GRID) -> Tensor:
    tokens = grid[0] * grid[1] + 3 * MECHANISMS[name][2]  # one prefix token more than native
    return torch.randn(BATCH, tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def mixed(attn: nn.Module, weights: Tensor, values: Tensor) -> Tensor:
    return attn.proj((weights @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_weights_make_the_output(name: str, extra: int) -> None:
    """Of so many draws of the values that no other weights could."""
    attn, x = build(name), make_input(name)
    options: dict[str, Any] = {}
    if extra:
        prompts = torch.randn(1, extra, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        options["extra_kv"] = attn.project_kv(prompts)
    with torch.no_grad():
        weights = map_of(attn, AttentionCall(x, GRID, **options)).weights()
        assert weights.shape == (BATCH, HEADS, x.shape[1], x.shape[1] + extra)
        for _ in range(x.shape[1] // (DIM // HEADS) + 1):
            nn.init.normal_(attn.qkv.weight[2 * DIM :])
            if extra:
                options["extra_kv"] = (options["extra_kv"][0], torch.randn_like(options["extra_kv"][1]))
            attention = map_of(attn, AttentionCall(x, GRID, **options))
            expected = attn(x, GRID, **options)
            torch.testing.assert_close(mixed(attn, weights, attention.values), expected, rtol=1e-10, atol=1e-10)
    if "linear" not in name:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert (weights >= 0).all()


def sees(name: str, grid: tuple[int, int], query: tuple[int, int], key: tuple[int, int]) -> bool:
    """By the papers' definitions, one pair of positions at a time."""
    options = MECHANISMS[name][1]
    answers = []
    for axis, (length, i, k) in enumerate(zip(grid, query, key)):
        if name.startswith("window"):
            size = options["window_size"]
            size = min(size if isinstance(size, int) else size[axis], length)
            padded, shift = -(-length // size) * size, size // 2 if options.get("shift") and size < length else 0
            a, b = ((p - shift) % padded // size for p in (i, k))
            answers.append(a == b and (i < shift) == (k < shift))
        elif name == "halo":
            block = i // options["block_size"] * options["block_size"]
            answers.append(block - options["halo_size"] <= k < block + options["block_size"] + options["halo_size"])
        else:
            kernel, dilation = (
                o if isinstance(o, int) else o[axis] for o in (options["kernel_size"], options.get("dilation", 1))
            )
            stride = options.get("stride", 1)
            group, j = i % dilation, i // dilation
            reach = -(-(length - group) // dilation)
            if options.get("is_causal", (False, False))[axis]:
                start, end = max(min(j, reach - 1) - kernel + 1, 0), j + 1
            else:
                leader = min(j // stride * stride + stride // 2, reach - 1)
                start = min(max(leader - kernel // 2, 0), reach - kernel)
                end = start + kernel
            answers.append(k % dilation == group and start <= k // dilation < end)
    return all(answers)


LOCAL = [name for name in MECHANISMS if name.startswith(("window", "neighborhood", "halo"))]


@pytest.mark.parametrize("name", LOCAL)
def test_weights_are_zero_outside_the_neighborhood(name: str) -> None:
    attn, x = build(name), make_input(name)
    attention = map_of(attn, AttentionCall(x, GRID))
    places = list(itertools.product(range(GRID[0]), range(GRID[1])))
    expected = torch.tensor([[sees(name, GRID, q, k) for k in places] for q in places])
    inside = attention.weights()[:, :, 3:, 3:] > 0
    assert (inside == expected).all()
    assert 0 < expected.sum() < expected.numel()


def test_routing_weights_are_the_union_of_the_routed_regions() -> None:
    attn, x = build("routing"), make_input("routing")
    attention = map_of(attn, AttentionCall(x, GRID))
    weights = attention.weights()[:, :, 3:, 3:].unflatten(2, GRID).unflatten(4, GRID) > 0
    H, W = (-(-length // 4) for length in GRID)  # of a region
    for b, y, x0 in itertools.product(range(BATCH), range(GRID[0]), range(GRID[1])):
        seen = weights[b, :, y, x0]
        assert (seen == seen[0]).all()
        assert (seen[0] == weights[b, 0, y // H * H, x0 // W * W]).all()  # one choice a region
        regions = {(int(i) // H, int(j) // W) for i, j in seen[0].nonzero()}
        assert len(regions) == 3
        whole = sum(
            len(range(i * H, min(i * H + H, GRID[0]))) * len(range(j * W, min(j * W + W, GRID[1]))) for i, j in regions
        )
        assert int(seen[0].sum()) == whole


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_halo_attention_on_maps(stride: int, mask_padding: bool) -> None:
    torch.manual_seed(1)
    attn = HaloAttention2d(8, 2, 4, 1, 2.0, stride, mask_padding).double().eval()
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    with torch.no_grad():
        weights = map_of(attn, AttentionCall(x)).weights()
        for _ in range(-(-weights.shape[-1] // 8)):
            nn.init.normal_(attn.kv.weight.view(2, 12, 8)[:, 4:])
            attention = map_of(attn, AttentionCall(x))
            got = (weights @ attention.values).transpose(2, 3).flatten(1, 2).unflatten(2, attention.query_grid)
            torch.testing.assert_close(got, attn(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert attention.query_grid == (6 // stride, -(-9 // stride))
    on_map = attention.on_grid(weights).sum((-1, -2))
    assert bool((on_map > 0.999999).all()) == mask_padding  # else the zeros around the map take some


def test_parts_of_a_map() -> None:
    attn, x = build("softmax"), make_input("softmax")
    attention = map_of(attn, AttentionCall(x, GRID))
    weights = attention.weights()
    assert (attention.batch, attention.heads, attention.queries, attention.keys) == (BATCH, HEADS, 57, 57)
    torch.testing.assert_close(attention.weights([5, 0]), weights[:, :, [5, 0]])
    torch.testing.assert_close(attention.of_query(2, 4), weights[:, :, 3 + 22, 3:].unflatten(-1, GRID))
    torch.testing.assert_close(attention.of_token(), weights[:, :, 2, 3:].unflatten(-1, GRID))
    torch.testing.assert_close(attention.of_token(0), weights[:, :, 0, 3:].unflatten(-1, GRID))
    torch.testing.assert_close(attention.mean_received(), weights.mean(2)[..., 3:].unflatten(-1, GRID))
    assert not weights.requires_grad


def test_few_weights_exist_at_a_time() -> None:
    asked = []

    def rows(queries: Tensor) -> Tensor:
        asked.append(len(queries))
        return torch.full((1, 2, len(queries), 3136), 1 / 3136)

    grid = (56, 56)
    attention = AttentionMap("a", "softmax", grid, grid, 0, 0, torch.zeros(1, 2, 3136, 4), rows)
    torch.testing.assert_close(attention.mean_received().sum((-1, -2)), torch.ones(1, 2), rtol=1e-4, atol=1e-4)
    assert sum(asked) == 3136
    assert max(asked) * 2 * 3136 <= 1 << 23


@pytest.mark.parametrize(
    "ask", [lambda m: m.of_query(6, 0), lambda m: m.of_query(0, -1), lambda m: m.weights([57]), lambda m: m.of_token(3)]
)
def test_what_is_not_there_is_told(ask: Any) -> None:
    attention = map_of(build("softmax"), AttentionCall(make_input("softmax"), GRID))
    with pytest.raises(VizattnError, match=r"there is no|queries 0 to 56"):
        ask(attention)


def test_half_precision_gives_float_weights() -> None:
    attn, x = build("neighborhood"), make_input("neighborhood")
    exact = map_of(attn, AttentionCall(x, GRID)).weights()
    rough = map_of(attn.bfloat16(), AttentionCall(x.bfloat16(), GRID)).weights()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=0.1, atol=0.05)
    torch.testing.assert_close(rough.sum(-1), torch.ones_like(rough.sum(-1)))
