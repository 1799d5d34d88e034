"""When a function with derivatives of its own may stand in for plain operations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

__all__ = ["derived_again", "eager", "gradients_of", "transformed", "watched"]

_PLAIN = (Tensor, nn.Parameter)


@torch.jit.unused
def transformed() -> bool:
    """Whether torch.func derives or maps what is computed."""
    return bool(torch._C._are_functorch_transforms_active())


def derived_again(grad: Tensor) -> bool:
    """Whether a backward pass must consist of plain operations: its result is derived itself, or `grad` is several."""
    functorch = torch._C._functorch
    return torch.is_grad_enabled() or functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def gradients_of(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Those of `inputs`, by the derivatives of each operation of `plain`: for where `derived_again` holds."""
    with torch.enable_grad():  # an input may be made of another, whose gradient is without what goes through this one
        inputs = [None if x is None else x.view_as(x) for x in inputs]
        output = plain(*inputs)
    used = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(output, used, grad, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple([next(grads) if x is not None and x.requires_grad else None for x in inputs])


def eager(*tensors: Tensor | None) -> bool:
    """Whether tensors are data that only autograd's backward pass follows.

    Compilers, exporters, torch.func and forward mode must see plain operations; what tracers hand in are often
    subclasses, and tensors on the meta device are there to be counted.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or transformed():
        return False
    forward_mode = forward_ad._current_level >= 0
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or x.is_meta or x.is_neg() or x.is_nested:
            return False
        if forward_mode and forward_ad.unpack_dual(x).tangent is not None:
            return False
    return True


def watched(*modules: nn.Module) -> bool:
    """Whether more than their class is called with modules: hooks, of theirs or of all, or a forward of their own."""
    of_all = every_module._global_forward_hooks or every_module._global_forward_pre_hooks
    if of_all or every_module._global_backward_hooks or every_module._global_backward_pre_hooks:
        return True
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "forward" in m.__dict__:
            return True
    return False
