"""One diagram for each attention: which keys a query sees, read from the attention itself with random weights."""

from __future__ import annotations

from typing import Any

import torch
from picture import FROZEN, PLAIN, Picture
from torch import nn

from vizattn import attention
from vizattn.attention import mechanism_maps  # noqa: F401  (registers how maps are read)
from vizattn.attention.maps import AttentionCall, map_of

__all__ = ["attention_pictures", "keys_seen"]

SIDE, CELL = 12, 12
GAP = 44
WIDE = SIDE * CELL


def keys_seen(attn: nn.Module, query: tuple[int, int], side: int = SIDE, head: int = 0) -> set[tuple[int, int]]:
    """The places of a square map that the query attends to with a weight above zero."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(37)  # one whose regions choose themselves, too
        for parameter in attn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        takes_maps = isinstance(attn, attention.CascadedGroupAttention)
        x = torch.randn((1, 16, side, side) if takes_maps else (1, side * side, 16), generator=generator)
        weights = map_of(attn.eval(), AttentionCall(x, (side, side))).of_query(*query)[0, head]
    return {(int(y), int(x)) for y, x in weights.nonzero()}


class Panels:
    """Grids side by side, each with a line of text below it; two in a row."""

    def __init__(self, title: str, count: int) -> None:
        rows = (count + 1) // 2
        self.picture = Picture(title, WIDE * min(count, 2) + GAP * (min(count, 2) + 1), rows * (WIDE + 54) + 8)
        self.count = 0

    def grid(self, label: str, query: tuple[int, int], keys: set[tuple[int, int]], lines: Any = ()) -> None:
        """The next panel."""
        left, top = GAP + (self.count % 2) * (WIDE + GAP), 8 + self.count // 2 * (WIDE + 54)
        self.picture.grid(left, top, SIDE, SIDE, CELL, keys=keys, query=query, lines=lines)
        self.picture.text(left + WIDE / 2, top + WIDE + 22, label, size=12)
        self.count += 1


def _softmax() -> Picture:
    panels = Panels("Softmax attention: a query sees all keys", 1)
    attn = attention.SoftmaxAttention(16, 2)
    panels.grid("a query and the keys it sees:\nall of them", (4, 3), keys_seen(attn, (4, 3)))
    return panels.picture


def _neighborhood() -> Picture:
    panels = Panels("Neighborhood attention: a query sees the k x k keys around it", 4)
    for label, query, options in (
        ("k = 5", (5, 6), {}),
        ("at a border the window\nis shifted, not cut", (0, 11), {}),
        ("k = 5, dilation 2:\nevery other token", (5, 6), {"dilation": 2}),
        ("k = 5, stride 5: five queries\nof a row share a window", (5, 6), {"stride": 5}),
    ):
        attn = attention.NeighborhoodAttention(16, 2, (SIDE, SIDE), kernel_size=5, **options)  # type: ignore[arg-type]
        panels.grid(label, query, keys_seen(attn, query))
    return panels.picture


def _bilevel_routing() -> Picture:
    panels = Panels("Bi-level routing: a query sees the regions that its region chose", 2)
    attn = attention.BilevelRoutingAttention(16, 2, (SIDE, SIDE), n_win=4, topk=4)
    for label, query in (
        ("the 4 regions chosen by\nthe region of the query", (4, 3)),
        ("another region chooses others", (7, 10)),
    ):
        panels.grid(label, query, keys_seen(attn, query), lines=(0, 3, 6, 9, 12))
    return panels.picture


def _agent() -> Picture:
    picture = Picture("Agent attention: agents collect from all keys, queries read from the agents", 420, 208)
    cell = 10
    picture.grid(10, 14, SIDE, SIDE, cell, keys={(y, x) for y in range(SIDE) for x in range(SIDE)})
    picture.text(70, 156, "all keys", size=12)
    picture.grid(180, 44, 3, 3, 20, keys={(y, x) for y in range(3) for x in range(3)})
    picture.text(210, 128, "agents: queries,\naveraged over a\ncoarse grid", size=12)
    picture.grid(290, 14, SIDE, SIDE, cell, query=(4, 3))
    picture.text(350, 156, "a query", size=12)
    picture.line((134, 74), (176, 74))
    picture.line((244, 74), (286, 74))
    picture.text(155, 184, "first softmax:\nover the keys", size=12)
    picture.text(265, 184, "second softmax:\nover the agents", size=12)
    return picture


def _cross_shaped() -> Picture:
    panels = Panels("Cross-shaped windows: half of the heads see vertical stripes, half horizontal ones", 2)
    attn = attention.CrossShapedAttention(16, 2, split_size=3)
    for head, label in enumerate(("the first half of the heads", "the second half")):
        panels.grid(label, (4, 4), keys_seen(attn, (4, 4), head=head), lines=(0, 12))
    return panels.picture


def _cascaded_group() -> Picture:
    picture = Picture(
        "Cascaded group attention: each head gets its channels and the output of the head before", 420, 208
    )
    attn = attention.CascadedGroupAttention(16, 2, window_size=7)
    picture.grid(10, 14, SIDE, SIDE, CELL, keys=keys_seen(attn, (4, 3)), query=(4, 3), lines=(0, 6, 12))
    picture.text(10 + WIDE / 2, 14 + WIDE + 24, "a query sees its window", size=12)
    for i in range(4):
        y = 30 + i * 38
        picture.text(180, y, f"channels {i + 1}", size=12, anchor="start")
        picture.line((254, y), (272, y))
        picture.box(306, y, 64, 24, f"head {i + 1}", FROZEN)
        picture.line((340, y), (366, y))
        if i < 3:
            picture.line((306, y + 12), (306, y + 26))
    picture.box(391, 87, 46, 138, "ReLU,\nlinear", PLAIN)
    picture.text(306, 182, "each adds what the head\nbefore it found to its input", size=12)
    return picture


def _linear() -> Picture:
    panels = Panels("L2ViT: windows and linear attention in turn", 2)
    window = attention.WindowAttention(16, 2, (SIDE, SIDE), window_size=7, rel_pos_bias=False)
    panels.grid("even blocks: a window;\nthe last are filled up", (4, 3), keys_seen(window, (4, 3)), lines=(0, 7, 12))
    panels.grid(
        "odd blocks: all keys, summed\nup in a d x d matrix", (4, 3), {(y, x) for y in range(SIDE) for x in range(SIDE)}
    )
    return panels.picture


def _halo() -> Picture:
    panels = Panels("Halo attention: the queries of a block share the keys in and around it", 2)
    attn = attention.HaloAttention(16, 2, (SIDE, SIDE), block_size=4, halo_size=2)
    for label, query in (("block 4, halo 2", (5, 5)), ("keys outside the map\nget no weight", (9, 10))):
        panels.grid(label, query, keys_seen(attn, query), lines=(0, 4, 8, 12))
    return panels.picture


def attention_pictures() -> dict[str, Picture]:
    """A picture for each attention, by its name."""
    return {
        "softmax": _softmax(),
        "neighborhood": _neighborhood(),
        "bilevel_routing": _bilevel_routing(),
        "agent": _agent(),
        "cross_shaped": _cross_shaped(),
        "cascaded_group": _cascaded_group(),
        "linear": _linear(),
        "halo": _halo(),
    }
