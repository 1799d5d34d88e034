"""When a function with derivatives of its own may stand in for plain operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["eager"]


def eager(*tensors: Tensor | None) -> bool:
    """Whether tensors are data that only autograd's backward pass follows.

    Compilers, exporters, torch.func and forward mode must see plain operations; what tracers hand in are often
    subclasses, and tensors on the meta device are there to be counted.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    given = [x for x in tensors if x is not None]
    return all(type(x) in (Tensor, nn.Parameter) and not x.is_meta for x in given) and all(
        forward_ad.unpack_dual(x).tangent is None for x in given
    )
