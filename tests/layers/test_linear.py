"""The linear layer in inference, where it is a convolution, against the usual one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vizattn.layers import Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 6), (1, 1, 6), (3, 0, 6), (4, 6), (2, 3, 5, 6)])
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
