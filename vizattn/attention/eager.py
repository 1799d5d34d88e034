"""When a function with derivatives of its own may stand in for plain operations."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["derived_again", "eager", "transformed"]


@torch.jit.unused
def transformed() -> bool:
    """Whether torch.func derives or maps what is computed."""
    return bool(torch._C._are_functorch_transforms_active())


def derived_again(grad: Tensor) -> bool:
    """Whether a backward pass must consist of plain operations: its result is derived itself, or `grad` is several."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def eager(*tensors: Tensor | None) -> bool:
    """Whether tensors are data that only autograd's backward pass follows.

    Compilers, exporters, torch.func and forward mode must see plain operations; what tracers hand in are often
    subclasses, and tensors on the meta device are there to be counted.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    given = [x for x in tensors if x is not None]
    return all(type(x) in (Tensor, nn.Parameter) and not x.is_meta for x in given) and all(
        forward_ad.unpack_dual(x).tangent is None for x in given
    )
