"""The MLP that many tokens pass through some at a time, against timm's."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils.flop_counter import FlopCounterMode

from vizattn.layers import Linear, Mlp, linear, mlp


def pair() -> tuple[Mlp, timm.layers.Mlp]:
    """Ours and timm's, of the same parameters, in evaluation."""
    ours, theirs = Mlp(6, 10, 7), timm.layers.Mlp(6, 10, 7)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def parts_of(layer: Mlp, x: Tensor) -> list[int]:
    """The number of tokens of each part that passes, of those whose hidden channels are kept if gradients are."""
    seen: list[int] = []
    whole, kept = mlp._pass, x.requires_grad

    def keep(saved: Tensor) -> Tensor:
        if kept and saved.shape[-1] == 10 and saved.grad_fn is not None:
            seen.append(saved.shape[:-1].numel())
        return saved

    with (
        mock.patch.object(mlp, "AT_ONCE", 40),
        mock.patch.object(mlp, "_pass", lambda self, x: (kept or seen.append(x.shape[:-1].numel()), whole(self, x))[1]),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
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


def test_frozen_it_passes_gradients_in_parts() -> None:
    layer, _ = pair()
    layer.requires_grad_(False)
    x = torch.randn(2, 5, 6, requires_grad=True)
    assert parts_of(layer, x) == parts_of(layer, x.detach()) == [4, 3, 3]
    hook = layer.act.register_full_backward_hook(lambda *_: None)
    assert parts_of(layer, x) == [10]
    hook.remove()
    hook = register_module_full_backward_hook(lambda *_: None)
    assert parts_of(layer, x) == [10]
    hook.remove()
    layer.fc2.bias.requires_grad_()
    assert parts_of(layer, x) == [10]


def _derivatives(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """First ones, alone, of several results at once, and in part of others; second ones of two kinds."""
    y = layer(x)
    directions = torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)
    plain = torch.autograd.grad(y, x, directions[0], retain_graph=True)[0]
    several = torch.autograd.grad(y, x, directions, retain_graph=True, is_grads_batched=True)[0]
    (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    of_some = torch.autograd.grad(first[0, :1].sum(), x, retain_graph=True)[0]
    of_both = torch.autograd.grad(first.pow(2).sum() + y.sum(), x, create_graph=True)[0]
    return [y, plain, several, first, of_some, of_both, torch.autograd.grad(of_both.pow(2).sum(), x)[0]]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 3), N=st.integers(1, 9), at_once=st.integers(1, 100))
def test_parts_have_the_derivatives_of_the_whole(B: int, N: int, at_once: int, bias: bool, approximate: str) -> None:
    ours, theirs = (kind(6, 10, 7, bias=bias).eval().requires_grad_(False) for kind in (Mlp, timm.layers.Mlp))
    theirs.load_state_dict(ours.state_dict())
    ours.act = theirs.act = nn.GELU(approximate)
    x = torch.randn(B, N, 6, requires_grad=True)
    with mock.patch.object(mlp, "AT_ONCE", at_once):
        found = _derivatives(ours, x)
    torch.testing.assert_close(found, _derivatives(theirs, x))


def test_kept_parts_end_with_the_result() -> None:
    layer, _ = pair()
    layer.requires_grad_(False)
    x = torch.randn(2, 5, 6, requires_grad=True)
    with mock.patch.object(mlp, "AT_ONCE", 40):
        y = layer(x)
    saved = y.grad_fn.next_functions[0][0].saved_tensors[2:]
    kept = [StorageWeakRef(part.untyped_storage()) for part in saved]
    del saved
    assert [part.expired() for part in kept] == [False] * 3
    del y
    assert all(part.expired() for part in kept)


def test_weights_that_are_no_parameters_get_their_gradient() -> None:
    layer, _ = pair()
    layer.requires_grad_(False)
    x = torch.randn(2, 5, 6, requires_grad=True)
    made = layer.fc1.weight.detach().requires_grad_()
    del layer.fc1.weight
    layer.fc1.weight = made * 2
    with mock.patch.object(mlp, "AT_ONCE", 40):
        layer(x).sum().backward()
    assert made.grad is not None and made.grad.norm() > 0


def test_tangents_of_weights() -> None:
    layer, theirs = pair()
    for each in (layer, theirs):
        each.requires_grad_(False)
    x, change = torch.randn(2, 5, 6, requires_grad=True), torch.randn(10, 6)
    with mock.patch.object(mlp, "AT_ONCE", 40), forward_ad.dual_level():
        tangents = []
        for each in (layer, theirs):
            weight = each.fc1.weight.detach()
            del each.fc1.weight
            each.fc1.weight = forward_ad.make_dual(weight, change)
            tangents.append(forward_ad.unpack_dual(each(x)).tangent)
    torch.testing.assert_close(*tangents)


class Quantised(nn.Linear):
    """A layer whose numbers depend on those of all tokens."""

    def forward(self, input: Tensor) -> Tensor:
        step = input.abs().max() / 7
        return super().forward((input / step).round() * step)


def _with(name: str, module: nn.Module) -> Callable[[Mlp], None]:
    return lambda layer: setattr(layer, name, module)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.drop1.train(),
        lambda layer: layer.double(),
        lambda layer: layer.act.register_forward_hook(lambda *_: None),
        lambda layer: layer.fc1.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer.fc1, "forward", layer.fc1.forward),
        _with("norm", nn.LayerNorm(10)),
        _with("fc1", Quantised(6, 10)),
        _with("fc2", nn.Sequential(nn.Linear(10, 7))),
        _with("act", nn.Sequential(nn.GELU())),
        _with("drop2", nn.Softmax(dim=1)),
    ],
)
def test_all_at_once_where_parts_could_be_seen(change: Callable[[Mlp], object]) -> None:
    layer, _ = pair()
    change(layer)
    with torch.no_grad():
        assert parts_of(layer, torch.randn(2, 5, 6).to(next(layer.parameters()).dtype)) == [10]


def test_all_at_once_where_somebody_looks_on() -> None:
    layer, _ = pair()
    x = torch.randn(2, 5, 6)
    assert parts_of(layer, x) == [10]
    with torch.no_grad():
        with FlopCounterMode(display=False):
            assert parts_of(layer, x) == [10]
        hook = register_module_forward_hook(lambda *_: None)
        assert parts_of(layer, x) == [10]
        hook.remove()
        assert len(parts_of(layer, x)) == 3


def test_many_tokens_of_a_part_are_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of ours, in the place of linear ones, get tokens as they would without parts."""
    layer, theirs = pair()
    layer.fc1, layer.fc2 = Linear(6, 10), Linear(10, 7)
    layer.load_state_dict(theirs.state_dict())
    monkeypatch.setattr(linear, "MANY", 3)
    monkeypatch.setattr(mlp, "AT_ONCE", 40)
    x = torch.randn(2, 5, 6)
    with torch.no_grad(), mock.patch.object(torch.nn.functional, "conv2d", wraps=torch.nn.functional.conv2d) as used:
        torch.testing.assert_close(layer.eval()(x), theirs(x))
    assert used.call_count == 6


def test_scripted_and_traced_it_is_the_same() -> None:
    layer, _ = pair()
    x = torch.randn(2, 5, 6)
    graph = torch.fx.symbolic_trace(layer)
    assert "fc1" in {node.target for node in graph.graph.nodes}
    with torch.no_grad(), mock.patch.object(mlp, "AT_ONCE", 40):
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
        torch.testing.assert_close(graph(x), layer(x))
