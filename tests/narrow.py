"""What is computed in float32, against the same in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same(output: Tensor, expected: Tensor, inputs: list[Tensor], wide: list[Tensor]) -> None:
    """Within what float32 loses, outputs and gradients."""
    cotangent = draw(99, *expected.shape).detach()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(output, inputs, cotangent)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, wide, cotangent.double())):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=2e-5)


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]
