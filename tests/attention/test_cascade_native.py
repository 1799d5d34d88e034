"""Cascaded group attention by the compiled library against torch in float64, which is held to the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from threads import threads
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

from vizattn import fuse
from vizattn.attention import CascadedGroupAttention, cascaded_group, native

pytestmark = pytest.mark.skipif(native.library is None, reason="vizattn was installed without a C++ compiler")


def module_with(channels: int = 16, num_heads: int = 2, window_size: int = 4, key_dim: int = 16) -> nn.Module:
    torch.manual_seed(channels + num_heads)
    kernels = [(5, 3, 7, 1)[i % 4] for i in range(num_heads)]
    module = CascadedGroupAttention(num_heads * channels, num_heads, window_size, key_dim, kernels).eval()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value), alpha=0.1)
    return module


def used(module: nn.Module, x: Tensor) -> bool:
    """Whether the library computes this."""
    with (
        torch.no_grad(),
        mock.patch.object(cascaded_group, "attend_cascade", wraps=cascaded_group.attend_cascade) as call,
    ):
        module(x)
    return bool(call.called)


@torch.no_grad()
def assert_right(module: nn.Module, x: Tensor) -> None:
    assert used(module, x)
    expected = copy.deepcopy(module).double()(x.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-4)


@example(B=1, H=1, W=2, channels=3, num_heads=1, window_size=7, key_dim=16, fused=False, lanes=16, count=1, last=1)
@example(B=2, H=9, W=19, channels=8, num_heads=4, window_size=19, key_dim=32, fused=True, lanes=8, count=2, last=False)
@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
    channels=st.integers(1, 40),
    num_heads=st.integers(1, 8),
    window_size=st.integers(1, 9),
    key_dim=st.sampled_from([16, 32, 48]),
    fused=st.booleans(),
    lanes=st.sampled_from([4, 8, 16]),
    count=st.integers(1, 3),
    last=st.booleans(),
)
def test_it_computes_what_torch_does(
    B: int,
    H: int,
    W: int,
    channels: int,
    num_heads: int,
    window_size: int,
    key_dim: int,
    fused: bool,
    lanes: int,
    count: int,
    last: bool,
) -> None:
    assume(min(window_size, max(H, W)) > 1)  # of single tokens there is nothing to gain
    module = module_with(channels, num_heads, window_size, key_dim)
    if fused:
        module = fuse(module)
    x = torch.randn(B, num_heads * channels, H, W)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    with mock.patch.object(native, "_lanes", lanes), threads(count):
        assert_right(module, x)


def test_parts_of_larger_tensors_and_layouts() -> None:
    module, x = module_with(), torch.randn(2, 40, 7, 9)
    assert_right(module, x[:, 3:35])
    assert_right(module, torch.randn(2, 9, 7, 32).permute(0, 3, 2, 1))
    last = x[:, :32].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert module(last).is_contiguous(memory_format=torch.channels_last)
        assert module(x[:, :32].contiguous()).is_contiguous()
        assert module(x[:0, :32]).shape == (0, 32, 7, 9)


def test_norms_and_layers_as_they_are_now() -> None:
    """Nothing is remembered of a module's parameters."""
    module, x = module_with(), torch.randn(1, 32, 5, 5)
    assert_right(module, x)
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    module.qkvs[1].bn.running_mean.add_(1)
    assert_right(module, x)
    module.qkvs[0].linear = nn.Linear(16, 48)
    module.dws[1].bn = nn.BatchNorm2d(16, affine=False).eval()
    assert_right(module, x)


def test_parameters_that_were_registered_again() -> None:
    """Their order in the module is another then."""
    module, x = module_with(), torch.randn(1, 32, 5, 5)
    for part in (module.qkvs[0].linear, module.qkvs[0].bn, module.dws[1].conv, module.dws[1].bn):
        prune.remove(prune.l1_unstructured(part, "weight", 0.5), "weight")
    parametrizations.weight_norm(module.qkvs[1].linear)
    assert not used(module, x)
    parametrize.remove_parametrizations(module.qkvs[1].linear, "weight")
    assert_right(module, x)


def _hooked(module: nn.Module) -> None:
    module.qkvs[1].linear.register_forward_hook(lambda part, args, output: output + 1)


def _other_eps(module: nn.Module) -> None:
    module.dws[0].bn.eps = 0.1


def _batch_statistics(module: nn.Module) -> None:
    module.qkvs[0].bn.train()


def _other_layer(module: nn.Module) -> None:
    module.qkvs[0].linear = nn.Sequential(nn.Linear(16, 48), nn.ReLU())


def _other_forward(module: nn.Module) -> None:
    module.dws[0].forward = lambda x: x + 1


def _parametrized(module: nn.Module) -> None:
    parametrizations.weight_norm(module.qkvs[1].linear)


class _Scaled(nn.Linear):
    """Has as many tensors as a layer and its norm."""

    def __init__(self) -> None:
        super().__init__(16, 48)
        for name in "abcd":
            self.register_parameter(name, nn.Parameter(torch.rand(48)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.a + self.b


def _subclass(module: nn.Module) -> None:
    module.qkvs[0] = _Scaled()


def _attribute(module: nn.Module) -> None:
    bias = module.qkvs[0].bn.bias.detach().clone()
    del module.qkvs[0].bn.bias
    module.qkvs[0].bn.bias = bias


def _sparse(module: nn.Module) -> None:
    module.qkvs[0].linear.weight = nn.Parameter(module.qkvs[0].linear.weight.detach().to_sparse_csr())


def _no_statistics(module: nn.Module) -> None:
    module.qkvs[1].bn = nn.BatchNorm1d(48, track_running_stats=False).eval()


def _forgotten_statistics(module: nn.Module) -> None:
    module.qkvs[1].bn.running_mean = module.qkvs[1].bn.running_var = None


def _more_taps(module: nn.Module) -> None:
    module.dws[0].conv = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)


@pytest.mark.parametrize(
    "change",
    [
        _hooked,
        _other_eps,
        _batch_statistics,
        _other_layer,
        _other_forward,
        _parametrized,
        _subclass,
        _attribute,
        _sparse,
        _no_statistics,
        _forgotten_statistics,
        _more_taps,
    ],
)
def test_modules_that_do_something_else_are_left_to_torch(change: Callable[[nn.Module], None]) -> None:
    module, x = module_with(), torch.randn(2, 32, 6, 5)
    change(module)
    assert not used(module, x)
    with torch.no_grad(), native.unused():
        expected = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), expected)


def test_hooks_of_all_modules() -> None:
    module, x = module_with(), torch.randn(1, 32, 6, 5)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda part, args, output: seen.append(type(part)))
    try:
        with torch.no_grad():
            module(x)
    finally:
        handle.remove()
    assert nn.Linear in seen and nn.BatchNorm1d in seen


def test_tensors_of_other_shapes_are_refused_by_torch() -> None:
    module = module_with()
    with torch.no_grad():
        for channels in (16, 64):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                module(torch.randn(1, channels, 6, 5))
        module.window_size = 6
        with pytest.raises((RuntimeError, IndexError), match=r"out of range|out of DATA bounds"):
            module(torch.randn(1, 32, 6, 6))


def test_tangents_of_parameters() -> None:
    module, x = module_with(), torch.randn(1, 32, 6, 5)
    weight = module.qkvs[0].linear.weight.detach()
    with torch.no_grad(), forward_ad.dual_level():
        changed = {"qkvs.0.linear.weight": forward_ad.make_dual(weight, torch.ones_like(weight))}
        output = torch.func.functional_call(module, changed, (x,))
        assert forward_ad.unpack_dual(output).tangent is not None


def test_what_is_left_to_torch() -> None:
    module, x = module_with(), torch.randn(2, 32, 6, 5)
    assert used(module, x)
    assert not used(module.train(), x)
    assert not used(module.eval().double(), x.double())
    assert not used(module_with(4, 9), torch.randn(1, 36, 5, 5))
    assert not used(module_with(key_dim=8), x)
    assert not used(module_with(window_size=1), x)
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(module, x)
    with mock.patch.object(cascaded_group, "attend_cascade") as call:
        module(x)
    assert not call.called
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
        scripted = torch.jit.script(module)
        torch.testing.assert_close(scripted(x), module(x), rtol=1e-4, atol=1e-5)
