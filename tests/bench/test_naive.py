"""The formulations that ours are measured against compute the same, and so do the implementations of each op."""

from __future__ import annotations

import pytest
import torch

from vizattn.bench import Unavailable, naive, ops
from vizattn.bench.ops import OPS, Shape

# What computes something else: all tokens, only the products, or a layer with weights of its own.
OTHERS = {"full softmax", "products alone", "timm"}
COMPILED = "flex_attention, compiled"  # tens of seconds
EQUAL = {"softmax": OTHERS - {"full softmax"}}


def tokens(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """(B, h, N, d), whatever the layout."""
    if x.ndim == 5:
        x = x if x.shape[1] == shape.heads else x.permute(0, 3, 1, 2, 4)
        x = x.flatten(2, 3)
    return x


def same(name: str) -> list[str]:
    """Implementations that must agree with ours."""
    return [other for other in OPS[name].builds if other not in EQUAL.get(name, OTHERS) | {"vizattn", COMPILED}]


@pytest.mark.parametrize("grid", [(14, 14), (21, 14)], ids=["square", "oblong"])
@pytest.mark.parametrize("name, other", [(name, other) for name in OPS for other in same(name)])
def test_implementations_of_an_op_agree(name: str, other: str, grid: tuple[int, int]) -> None:
    shape = Shape(2, 2, grid, 8, "fp32", "forward")
    ours = OPS[name].builds["vizattn"](shape)
    try:
        theirs = OPS[name].builds[other](shape)
    except Unavailable as reason:
        pytest.skip(str(reason))
    expected, found = ours.function(*ours.inputs), theirs.function(*theirs.inputs)
    torch.testing.assert_close(tokens(found, shape), tokens(expected, shape), rtol=1e-4, atol=1e-5)
    assert ours.macs == theirs.macs or name in ("linear", "softmax")  # these keep all weights


@pytest.mark.parametrize("name", OPS)
def test_ops_have_gradients_for_all_inputs(name: str) -> None:
    shape = Shape(1, 2, (14, 14), 16, "fp32", "train")
    gradients = ops.build(name, "vizattn", shape, False).run()
    assert all(torch.isfinite(g).all() for g in gradients)  # type: ignore[attr-defined]
    assert len(gradients) == len(OPS[name].builds["vizattn"](shape).inputs)  # type: ignore[arg-type]


def test_neighborhood_keys_by_hand() -> None:
    assert naive.neighborhood_keys(5, 3, 1).tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert naive.neighborhood_keys(7, 3, 2)[3:5].tolist() == [[1, 3, 5], [2, 4, 6]]


def test_multiply_adds_follow_the_definition() -> None:
    forward = {
        mode: ops.build("neighborhood", "vizattn", Shape(1, 2, (14, 16), 8, "fp32", mode), False).macs
        for mode in ("forward", "train")
    }
    assert forward["forward"] == 2 * (14 * 16) * 49 * (2 * 8)  # scores and weighted sums
    assert forward["train"] == 3 * forward["forward"]
