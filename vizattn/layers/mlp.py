"""The MLP of transformer blocks, which on a CPU, unless it trains, does not write all hidden channels to one tensor."""

import threading
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.layers.eager import derived_again, eager, watched
from vizattn.layers.linear import Linear, eager_on_cpu

__all__ = ["FrozenMlp", "Mlp"]

#: Hidden channels of all tokens of a part at most, 16 MB: of much more, the pages are new to the process each time.
AT_ONCE = 1 << 22

_BY_TOKEN = (nn.Linear, Linear, nn.GELU, nn.ReLU, nn.SiLU, nn.Dropout, nn.Identity)


class Mlp(timm.layers.Mlp):
    """timm's. In float32 on a CPU, many tokens pass through it some at a time, unless it trains."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_features) -> (B, N, out_features); other shapes in the usual way."""
        if torch.jit.is_scripting():
            x = self.drop1(self.act(self.fc1(x)))
            return self.drop2(self.fc2(self.norm(x)))
        else:
            return _pass_in_parts(self, x)


class FrozenMlp(Mlp):
    """timm's in a model to which an adapter is attached: in parts only where they are kept for a backward pass.

    Without gradients it does as before, so that no bit changes by attaching or merging.
    """


@torch.jit.unused
def _pass_in_parts(mlp: timm.layers.Mlp, x: Tensor) -> Tensor:
    if not eager(x) or x.ndim != 3 or not eager_on_cpu(x):
        return _pass(mlp, x)
    learning, tokens = torch.is_grad_enabled() and x.requires_grad, x.flatten(0, 1)
    parts = -(-len(tokens) * int(getattr(mlp.fc1, "out_features", 0)) // AT_ONCE)
    if parts < 2 or not _may_part(mlp, learning):
        return _pass(mlp, x)
    if learning:
        output = _Parts.apply(tokens, *_weights(mlp), mlp.act.approximate, parts)[0]
    else:
        output = torch.cat([_pass(mlp, part.unsqueeze(0)).squeeze(0) for part in tokens.tensor_split(parts)])
    return output.unflatten(0, x.shape[:2])


def _pass(mlp: timm.layers.Mlp, x: Tensor) -> Tensor:
    x = mlp.drop1(mlp.act(mlp.fc1(x)))
    return mlp.drop2(mlp.fc2(mlp.norm(x)))


def _may_part(mlp: timm.layers.Mlp, learning: bool) -> bool:
    """Whether no layer mixes tokens, and nothing but the result can be seen from outside."""
    if isinstance(mlp, FrozenMlp) and not learning:
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in mlp.parameters()):
        return False  # the gradients of weights would be summed up part by part
    layers = [mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2]
    if watched(*layers) or torch._C._len_torch_dispatch_stack() or not all(_by_token(layer) for layer in layers):  # type: ignore[attr-defined]
        return False
    if not learning:
        return True
    if type(mlp.act) is not nn.GELU or type(mlp.norm) is not nn.Identity or torch.is_autocast_enabled("cpu"):
        return False
    weights = _weights(mlp)  # which may be no parameters
    dense = all(w is None or (w.layout is torch.strided and not w.requires_grad) for w in weights)
    return dense and eager(*weights)


def _weights(mlp: Any) -> tuple[Tensor | None, ...]:
    return mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias


def _by_token(layer: nn.Module) -> bool:
    """Whether it is one of those that are known to do the same to each token."""
    return type(layer) in _BY_TOKEN and not (isinstance(layer, nn.Dropout) and layer.training)


class _Room(threading.local):
    """Where a part's hidden channels pass through GELU: taken and freed between others, it would leave gaps."""

    floats: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        """Room of the shape of `x`."""
        if self.floats is None or self.floats.numel() < x.numel():
            self.floats = torch.empty(x.numel(), dtype=torch.float32, device="cpu")
        return self.floats[: x.numel()].view_as(x)


_room = _Room()


class _Parts(torch.autograd.Function):
    """A frozen MLP with GELU on (N, C), in parts each of which writes to its place in the result.

    Hidden channels before GELU are kept. They are returned, too, for a backward pass that is derived itself to have
    where they come from without keeping the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        approximate: str,
        parts: int,
    ) -> tuple[Tensor, ...]:
        output = x.new_empty(len(x), len(weight2))
        hidden = []
        for part, out in zip(x.tensor_split(parts), output.tensor_split(parts)):
            hidden.append(F.linear(part, weight1, bias1))
            activated = torch.ops.aten.gelu.out(hidden[-1], approximate=approximate, out=_room.like(hidden[-1]))
            if bias2 is None:
                torch.mm(activated, weight2.t(), out=out)
            else:
                torch.addmm(bias2, activated, weight2.t(), out=out)
        ctx.save_for_backward(weight1, weight2, *hidden)
        ctx.set_materialize_grads(False)
        ctx.approximate = approximate
        return output, *hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight1, weight2, *hidden = ctx.saved_tensors
        n = len(hidden)
        with torch.autocast(weight1.device.type, enabled=False):  # somebody may call backward inside autocast
            if grad is not None and not derived_again(grad) and all(more is None for more in grads):
                d_x = grad.new_empty(len(grad), weight1.shape[1])
                for part, kept, out in zip(grad.tensor_split(n), hidden, d_x.tensor_split(n)):
                    d = torch.mm(part, weight2, out=_room.like(kept))
                    torch.ops.aten.gelu_backward.grad_input(d, kept, approximate=ctx.approximate, grad_input=d)
                    torch.mm(d, weight1, out=out)
            else:
                parts = [None] * n if grad is None else grad.tensor_split(n)
                each = zip(parts, hidden, grads)
                d_x = torch.cat([_derived(*one, weight2, ctx.approximate) @ weight1 for one in each])
        return d_x, None, None, None, None, None, None


def _derived(grad: Tensor | None, hidden: Tensor, more: Tensor | None, weight2: Tensor, approximate: str) -> Tensor:
    """The gradient of a part's hidden channels, of its result's and `more` of their own, by plain operations."""
    if grad is None:
        return torch.zeros_like(hidden) if more is None else more
    d_hidden = torch.ops.aten.gelu_backward(grad @ weight2, hidden, approximate=approximate)
    return d_hidden if more is None else d_hidden + more
