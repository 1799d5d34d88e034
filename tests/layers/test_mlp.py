"""The MLP that many tokens pass through some at a time, against timm's."""

from __future__ import annotations

from unittest import mock

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vizattn.layers import Mlp, mlp


def pair() -> tuple[Mlp, timm.layers.Mlp]:
    """Ours and timm's, of the same parameters, in evaluation."""
    ours, theirs = Mlp(6, 10, 7), timm.layers.Mlp(6, 10, 7)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def parts_of(layer: Mlp, x: Tensor) -> list[int]:
    """The number of tokens of each part that passes through the first layer."""
    seen: list[int] = []
    first = layer.fc1.forward
    with (
        mock.patch.object(mlp, "AT_ONCE", 40),
        mock.patch.object(layer.fc1, "forward", lambda x: seen.append(x.shape[:-1].numel()) or first(x)),
    ):
        layer(x)
    return seen


@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 3), N=st.integers(1, 9), at_once=st.integers(1, 100))
def test_parts_equal_the_whole(B: int, N: int, at_once: int) -> None:
    ours, theirs = pair()
    x = torch.randn(B, N, 6)
    with mock.patch.object(mlp, "AT_ONCE", at_once), torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_few_tokens_pass_at_a_time() -> None:
    layer, _ = pair()
    with torch.no_grad():
        assert parts_of(layer, torch.randn(2, 5, 6)) == [4, 3, 3]
        assert parts_of(layer, torch.randn(1, 4, 6)) == [4]
        assert parts_of(layer, torch.randn(10, 6)) == [10]


@pytest.mark.parametrize("reason", ["gradients", "training", "hook", "norm", "type", "layer"])
def test_all_at_once_where_parts_could_be_seen(reason: str) -> None:
    layer, _ = pair()
    x = torch.randn(2, 5, 6)
    if reason == "training":
        layer.train()
    elif reason == "hook":
        layer.act.register_forward_hook(lambda *_: None)
    elif reason == "norm":
        layer.norm = torch.nn.LayerNorm(10)
    elif reason == "type":
        layer, x = layer.double(), x.double()
    elif reason == "layer":  # as adapters put in the place of linear layers
        layer.fc2 = torch.nn.Sequential(layer.fc2)
    with torch.set_grad_enabled(reason == "gradients"):
        assert parts_of(layer, x) == [10]


def test_scripted_and_traced_it_is_the_same() -> None:
    layer, _ = pair()
    x = torch.randn(2, 5, 6)
    graph = torch.fx.symbolic_trace(layer)
    assert "fc1" in {node.target for node in graph.graph.nodes}
    with torch.no_grad(), mock.patch.object(mlp, "AT_ONCE", 40):
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
        torch.testing.assert_close(graph(x), layer(x))
