"""Layers that are another one in inference, a convolution or a product of matrices, against the usual ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vizattn.layers import Linear, PointwiseConv, linear


@pytest.fixture(autouse=True, params=[True, False], ids=["MKL", "oneDNN"])
def makers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU of either kind."""
    monkeypatch.setattr(linear, "_mkl_is_faster", lambda: request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 6), (1, 1, 6), (2, 2048, 6), (3, 0, 6), (4, 6), (2, 3, 5, 6)])
def test_same_as_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(6, 4, bias=bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        y = layer(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_slices_of_tokens() -> None:
    layer, x = Linear(6, 4), torch.randn(2, 9, 12)
    with torch.no_grad():
        for part in (x[:, 1:, :6], x[..., 6:], x.transpose(1, 2)[:, :, :6]):
            torch.testing.assert_close(layer(part), F.linear(part, layer.weight, layer.bias))


def test_it_is_a_linear_layer_to_everybody_else() -> None:
    layer = Linear(6, 4)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 5, 6)
    script = torch.jit.script(layer)
    with torch.no_grad():
        torch.testing.assert_close(script(x), layer(x))
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
        targets = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert "aten.linear.default" in targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 1, 1), (3, 6, 1, 4), (0, 6, 3, 3)])
def test_same_as_convolution(shape: tuple[int, ...], layout: torch.memory_format, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = PointwiseConv(6, 4, bias=bias), torch.randn(shape).contiguous(memory_format=layout)
    expected = F.conv2d(x, layer.weight, layer.bias)
    with torch.inference_mode():
        y = layer(x)
    assert y.numel() == 0 or y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_slices_of_maps() -> None:
    layer, x = PointwiseConv(6, 4), torch.randn(2, 12, 8, 9)
    with torch.no_grad():
        for part in (x[:, 6:], x[:, :6, ::2, 1:], x[:, :6].transpose(2, 3), x[0, :6]):
            torch.testing.assert_close(layer(part), F.conv2d(part, layer.weight, layer.bias))


def test_it_is_a_convolution_to_everybody_else() -> None:
    layer, x = PointwiseConv(6, 4), torch.randn(2, 6, 5, 5)
    assert isinstance(layer, nn.Conv2d)
    assert list(layer.state_dict()) == ["weight", "bias"]
    script = torch.jit.script(layer)
    with torch.no_grad():
        torch.testing.assert_close(script(x), layer(x))
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
        targets = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert "aten.conv2d.default" in targets
