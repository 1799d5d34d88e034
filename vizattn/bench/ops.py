"""Attention ops: ours, the same by other libraries, the definition written out, and full softmax attention.

Shapes: B batch, h heads, H x W tokens, N = H * W, d channels a head, C = h * d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn import attention
from vizattn.attention import native
from vizattn.bench import naive, peers
from vizattn.bench.case import DTYPES, Case, Options, Unavailable, Work, differentiate
from vizattn.bench.macs import count_macs
from vizattn.errors import VizattnError, unknown

__all__ = ["OPS", "Op", "Shape", "cases"]


class Shape(NamedTuple):
    """What the inputs of an op look like."""

    batch: int
    heads: int
    grid: tuple[int, int]
    dim: int
    dtype: str
    mode: str

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def channels(self) -> int:
        """C."""
        return self.heads * self.dim

    def maps(self, count: int = 3) -> list[Tensor]:
        """Queries, keys, values, ... (B, h, H, W, d), the same in each process."""
        generator = torch.Generator().manual_seed(0)
        shape = (count, self.batch, self.heads, *self.grid, self.dim)
        return list(torch.randn(shape, generator=generator).to(DTYPES[self.dtype]))

    def sequences(self, count: int = 3) -> list[Tensor]:
        """The same (B, h, N, d)."""
        return [x.flatten(2, 3) for x in self.maps(count)]

    def heads_last(self) -> list[Tensor]:
        """The same (B, H, W, h, d), in this order in memory."""
        return [x.permute(0, 2, 3, 1, 4).contiguous() for x in self.maps()]

    def image(self) -> Tensor:
        """(B, C, H, W)."""
        return self.maps(1)[0].permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()

    def parameter(self, *shape: int) -> Tensor:
        """A learnt table."""
        generator = torch.Generator().manual_seed(1)
        return (0.1 * torch.randn(shape, generator=generator)).to(DTYPES[self.dtype])

    def pairs(self, keys: float) -> float:
        """Multiply-adds of attention in which each query sees so many keys: scores and weighted sums."""
        return 2.0 * self.batch * self.channels * self.tokens * keys


class Built(NamedTuple):
    """A function with its inputs, all of which get a gradient in training."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    macs: float | None = None
    """Of the forward pass by definition; None: as counted."""


Build = Callable[[Shape], Built]


@dataclass(frozen=True)
class Op:
    """One attention: how it is built by each implementation; ours is called "vizattn"."""

    reference: str
    builds: dict[str, Build]
    about: str = ""
    forward_only: frozenset[str] = field(default_factory=frozenset)


def full_softmax(shape: Shape) -> Built:
    """All tokens by all tokens, by torch's fused kernel."""
    return Built(F.scaled_dot_product_attention, shape.sequences(), shape.pairs(shape.tokens))


def explicit_softmax(shape: Shape) -> Built:
    """The same with the map of weights kept."""
    return Built(naive.explicit_attention, shape.sequences(), shape.pairs(shape.tokens))


def by_torch(build: Build) -> Build:
    """Ours where the compiled library cannot be used."""

    def built(shape: Shape) -> Built:
        ours = build(shape)

        def call(*inputs: Tensor) -> Tensor:
            with native.unused():
                return ours.function(*inputs)

        return ours._replace(function=call)

    return built


# Neighborhoods ------------------------------------------------------------------------------------------------------

KERNEL = 7


def _dilation(shape: Shape, wanted: int) -> int:
    """`wanted`, or the most that fits into the map."""
    most = min(shape.grid) // KERNEL
    if most < 1:
        raise VizattnError(f"A neighborhood of {KERNEL} x {KERNEL} does not fit into {text_of(shape.grid)} tokens.")
    return min(wanted, most)


def _rpb(shape: Shape) -> Tensor:
    return shape.parameter(shape.heads, 2 * KERNEL - 1, 2 * KERNEL - 1)


def our_neighborhood(shape: Shape, dilation: int, bias: bool) -> Built:
    """`vizattn.attention.na2d`."""
    dilation = _dilation(shape, dilation)
    inputs = [*shape.heads_last(), *([_rpb(shape)] if bias else [])]

    def call(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> Tensor:
        return attention.na2d(query, key, value, KERNEL, dilation=dilation, rpb=rpb)

    return Built(call, inputs, shape.pairs(KERNEL**2))


def gathered_neighborhood(shape: Shape, dilation: int, bias: bool) -> Built:
    """Keys and values copied together for each query."""
    dilation = _dilation(shape, dilation)
    inputs = [*shape.maps(), *([_rpb(shape)] if bias else [])]

    def call(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> Tensor:
        return naive.gather_neighborhood(query, key, value, KERNEL, dilation, rpb)

    return Built(call, inputs, shape.pairs(KERNEL**2))


def natten_neighborhood(shape: Shape, dilation: int) -> Built:
    """natten's."""
    call = peers.natten_neighborhood(KERNEL, _dilation(shape, dilation))
    return Built(call, shape.heads_last(), shape.pairs(KERNEL**2))


def flex_neighborhood(shape: Shape, dilation: int, compiled: bool) -> Built:
    """torch's flex_attention with a mask."""
    call = peers.flex_neighborhood(shape.grid, KERNEL, _dilation(shape, dilation), compiled)
    return Built(call, shape.sequences(), shape.pairs(KERNEL**2))


def _neighborhood(dilation: int, bias: bool, about: str) -> Op:
    ours = functools.partial(our_neighborhood, dilation=dilation, bias=bias)
    builds: dict[str, Build] = {
        "vizattn": ours,
        "torch alone": by_torch(ours),
        "gather": functools.partial(gathered_neighborhood, dilation=dilation, bias=bias),
        "full softmax": full_softmax,
    }
    if not bias:  # neither of these has one
        builds |= {
            "natten": functools.partial(natten_neighborhood, dilation=dilation),
            "flex_attention": functools.partial(flex_neighborhood, dilation=dilation, compiled=False),
            "flex_attention, compiled": functools.partial(flex_neighborhood, dilation=dilation, compiled=True),
        }
    no_backward = frozenset({"natten", "flex_attention", "flex_attention, compiled"})
    return Op("full softmax", builds, about, no_backward)


# Regions, blocks and windows ----------------------------------------------------------------------------------------

WINDOWS, TOPK = 7, 4
WINDOW = 7
BLOCK, HALO = 8, 3


def _region(shape: Shape) -> tuple[int, int]:
    return -(-shape.grid[0] // WINDOWS), -(-shape.grid[1] // WINDOWS)


def our_regions(shape: Shape) -> Built:
    """`vizattn.attention.bilevel_routing_attention`."""
    region = _region(shape)
    call = functools.partial(
        attention.bilevel_routing_attention, grid_size=shape.grid, region_size=region, topk=TOPK, scale=shape.dim**-0.5
    )
    return Built(call, shape.sequences(), shape.pairs(TOPK * region[0] * region[1]))


def gathered_regions(shape: Shape) -> Built:
    """Keys and values of the chosen regions copied together."""
    region = _region(shape)
    if shape.grid[0] % region[0] or shape.grid[1] % region[1]:
        raise Unavailable(f"regions of {text_of(region)} do not divide the map")
    call = functools.partial(naive.gather_regions, region=region, topk=TOPK)
    return Built(call, shape.maps(), shape.pairs(TOPK * region[0] * region[1]))


def _layer(module: nn.Module, x: Tensor) -> Built:
    """A layer: its parameters get gradients, too."""
    module = module.to(x.dtype)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters)), x)

    return Built(call, [x, *(p.detach() for p in module.parameters())])


def our_halo(shape: Shape) -> Built:
    """`vizattn.attention.HaloAttention2d`, projections included."""
    torch.manual_seed(0)
    built = _layer(
        attention.HaloAttention2d(shape.channels, shape.heads, block_size=BLOCK, halo_size=HALO), shape.image()
    )
    # As on the meta device, where no product stands in for the sums of positions' logits.
    return built._replace(macs=count_macs(lambda: built.function(*[x.to("meta") for x in built.inputs])))


def timm_halo(shape: Shape) -> Built:
    """timm's layer."""
    from timm.layers.halo_attn import HaloAttn

    if any(length % BLOCK for length in shape.grid):
        raise Unavailable(f"timm's layer takes maps that blocks of {BLOCK} divide")
    torch.manual_seed(0)
    layer = HaloAttn(shape.channels, num_heads=shape.heads, dim_head=shape.dim, block_size=BLOCK, halo_size=HALO)
    return _layer(layer, shape.image())


def our_cascade(shape: Shape) -> Built:
    """`vizattn.attention.CascadedGroupAttention`."""
    torch.manual_seed(0)
    kernels = (5,) * shape.heads
    layer = attention.CascadedGroupAttention(shape.channels, shape.heads, WINDOW, kernel_sizes=kernels)
    return _layer(layer.train(shape.mode == "train"), shape.image())


def timm_cascade(shape: Shape) -> Built:
    """timm's layer of EfficientViT."""
    from timm.models.efficientvit_msra import LocalWindowAttention

    torch.manual_seed(0)
    layer = LocalWindowAttention(
        shape.channels,
        key_dim=16,
        num_heads=shape.heads,
        attn_ratio=shape.dim // 16,  # its heads are so many times as wide as their keys
        resolution=shape.grid[0],
        window_resolution=WINDOW,
        kernels=(5,) * shape.heads,
    )
    if shape.dim % 16 or shape.grid[0] != shape.grid[1]:
        raise Unavailable("timm's layer takes square maps and multiples of 16 channels a head")
    return _layer(layer.train(shape.mode == "train"), shape.image())


def _windows(shape: Shape) -> tuple[list[Tensor], int]:
    """Queries, keys and values in windows (B * n, h, L, d); the map is filled up to whole windows."""
    H, W = (-(-length // WINDOW) * WINDOW for length in shape.grid)
    x = shape._replace(grid=(H, W)).maps()
    cut = [q.unflatten(3, (-1, WINDOW)).unflatten(2, (-1, WINDOW)).permute(0, 2, 4, 1, 3, 5, 6) for q in x]
    return [q.reshape(-1, shape.heads, WINDOW**2, shape.dim) for q in cut], H * W


def our_windows(shape: Shape) -> Built:
    """`vizattn.attention.window_attention` with learnt biases."""
    inputs, tokens = _windows(shape)
    bias = shape.parameter(shape.heads, WINDOW**2, WINDOW**2)
    macs = shape.pairs(WINDOW**2) * tokens / shape.tokens
    return Built(attention.window_attention, [*inputs, bias], macs)


def explicit_windows(shape: Shape) -> Built:
    """The same with products written out."""
    return our_windows(shape)._replace(function=naive.explicit_attention)


def our_stripes(shape: Shape) -> Built:
    """`vizattn.attention.stripe_attention` in vertical stripes of width 7, with the convolution of the values."""
    qkv = torch.stack(shape.heads_last()).flatten(4)
    lepe = shape.parameter(shape.channels, 1, 3, 3)
    stripe = (shape.grid[0], min(WINDOW, shape.grid[1]))

    def call(qkv: Tensor, weight: Tensor) -> Tensor:
        return attention.stripe_attention(qkv, stripe, shape.heads, weight, None)

    macs = shape.pairs(stripe[0] * stripe[1]) + 9.0 * shape.batch * shape.tokens * shape.channels
    return Built(call, [qkv, lepe], macs)


# Linear cost --------------------------------------------------------------------------------------------------------

AGENTS = 49


def _agent(shape: Shape, function: Callable[..., Tensor], bias: bool = False) -> Built:
    inputs = [*shape.sequences(), shape.parameter(shape.batch, shape.heads, AGENTS, shape.dim)]
    if bias:
        inputs += [shape.parameter(1, shape.heads, AGENTS, shape.tokens) for _ in range(2)]
    return Built(function, inputs, 2 * shape.pairs(AGENTS))


def our_agents(shape: Shape, bias: bool = False) -> Built:
    """`vizattn.attention.agent_attention`, 49 agents."""
    return _agent(shape, attention.agent_attention, bias)


def agent_products(shape: Shape) -> Built:
    """Its matrix products alone."""
    return _agent(shape, naive.agent_products)


def _linear(shape: Shape, function: Callable[..., Tensor]) -> Built:
    return Built(function, shape.sequences(), shape.pairs(shape.dim))


def our_linear(shape: Shape) -> Built:
    """`vizattn.attention.linear_attention`."""
    return _linear(shape, attention.linear_attention)


def linear_products(shape: Shape) -> Built:
    """Its matrix products alone."""
    return _linear(shape, naive.linear_products)


def quadratic_linear(shape: Shape) -> Built:
    """The same with its weights, all tokens by all, kept."""
    return Built(naive.quadratic_linear, shape.sequences(), shape.pairs(shape.tokens))


def our_softmax(shape: Shape) -> Built:
    """`vizattn.attention.softmax_attention`."""
    return full_softmax(shape)._replace(function=attention.softmax_attention)


_LINEAR: dict[str, Build] = {
    "vizattn": our_linear,
    "torch alone": by_torch(our_linear),
    "products alone": linear_products,
    "written out": quadratic_linear,
}
_FULL: dict[str, Build] = {"full softmax": full_softmax}


def _agents(bias: bool) -> Op:
    ours = functools.partial(our_agents, bias=bias)
    builds: dict[str, Build] = {"vizattn": ours, "torch alone": by_torch(ours), "products alone": agent_products}
    return Op("full softmax", builds | _FULL, f"{AGENTS} agents, {'learnt' if bias else 'no'} biases")


OPS: dict[str, Op] = {
    "neighborhood": _neighborhood(1, False, f"windows of {KERNEL} x {KERNEL}"),
    "neighborhood, biased": _neighborhood(1, True, "the same with learnt biases by offset"),
    "neighborhood, dilated": _neighborhood(8, False, "the same with dilation 8, or what fits into the map"),
    "neighborhood, dilated, biased": _neighborhood(8, True, "both"),
    "bilevel_routing": Op(
        "full softmax",
        {"vizattn": our_regions, "torch alone": by_torch(our_regions), "gather": gathered_regions, **_FULL},
        f"{WINDOWS} x {WINDOWS} regions, each routed to {TOPK}",
    ),
    "halo": Op(
        "full softmax",  # timm's layer does not take every map
        {"vizattn": our_halo, "timm": timm_halo, **_FULL},
        f"layers: blocks of {BLOCK}, halo of {HALO}",
    ),
    "agent": _agents(bias=False),
    "agent, biased": _agents(bias=True),
    "linear": Op("full softmax", _LINEAR | _FULL, "ReLU as feature map"),
    "window": Op(
        "full softmax",
        {"vizattn": our_windows, "torch alone": by_torch(our_windows), "written out": explicit_windows, **_FULL},
        f"windows of {WINDOW} x {WINDOW}, learnt biases",
    ),
    "cross_shaped": Op(
        "full softmax",
        {"vizattn": our_stripes, "torch alone": by_torch(our_stripes), **_FULL},
        f"stripes of width {WINDOW}",
    ),
    "cascaded_group": Op(
        "timm",
        {"vizattn": our_cascade, "torch alone": by_torch(our_cascade), "timm": timm_cascade},
        "layers of EfficientViT",
    ),
    "softmax": Op("full softmax", {"vizattn": our_softmax, "written out": explicit_softmax, **_FULL}, "all tokens"),
}


def build(op: str, implementation: str, shape: Shape, compiled: bool) -> Work:
    """One implementation, ready to run."""
    function, inputs, macs = OPS[op].builds[implementation](shape)
    with torch.inference_mode():
        macs = count_macs(lambda: function(*inputs)) if macs is None else macs
    call: Any = torch.compile(function) if compiled else function

    if shape.mode == "forward":

        def forward() -> Tensor:
            with torch.inference_mode():
                return call(*inputs)

        return Work(forward, macs)

    inputs = [x.detach().clone().requires_grad_(True) for x in inputs]
    # Each product has two in the backward pass: the definition's, though some compute the weights again.
    return Work(lambda: differentiate(call(*inputs), inputs), 3 * macs)


def text_of(grid: tuple[int, int]) -> str:
    """``(56, 40)`` -> ``"56x40"``."""
    return f"{grid[0]}x{grid[1]}"


def cases(options: Options) -> list[Case]:
    """Every op by every implementation, at each shape."""
    for variant in options.variants:
        if variant not in ("eager", "compile"):
            raise unknown("variant of ops", variant, ("eager", "compile"))
    if "amp" in options.dtypes:
        raise VizattnError("Ops have no autocast: give --dtype fp32 or bf16.")
    found = []
    for name, op in OPS.items():
        for grid in options.sizes or ((56, 56),):
            for batch in options.batches or (1,):
                for dtype in options.dtypes:
                    for mode in options.modes or ("forward", "train"):
                        shape = Shape(batch, options.heads, grid, options.dim, dtype, mode)
                        found += _comparison(name, op, shape, options.variants)
    return found


def _comparison(name: str, op: Op, shape: Shape, variants: tuple[str, ...]) -> list[Case]:
    return [
        Case(
            group="ops",
            subject=name,
            name=implementation,
            build=functools.partial(build, name, implementation, shape, variant == "compile"),
            mode=shape.mode,
            batch=shape.batch,
            size=text_of(shape.grid),
            dtype=shape.dtype,
            variant=variant,
            reference=implementation == op.reference and variant == variants[0],
            ours=implementation == "vizattn",
        )
        for variant in variants
        for implementation in op.builds
        if not (implementation in op.forward_only and (shape.mode == "train" or variant == "compile"))
    ]
