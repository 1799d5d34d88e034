"""The MLP of transformer blocks, which on a CPU, unless it trains, does not write all hidden channels to one tensor."""

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from vizattn.layers.linear import Linear, eager_on_cpu

__all__ = ["FrozenMlp", "Mlp"]

#: Hidden channels of all tokens of a part at most, 16 MB: of much more, the pages are new to the process each time.
AT_ONCE = 1 << 22

#: Where they are kept for a backward pass: more did not fit into the gaps that tokens leave, and took more memory.
KEPT_AT_ONCE = 1 << 21

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
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
    parts = _parts(mlp, x)
    if parts == 1:
        return _pass(mlp, x)
    tokens = x.flatten(0, 1).unsqueeze(0)
    least, more = divmod(tokens.shape[1], parts)
    outputs = [_pass(mlp, part) for part in tokens.split([least + (i < more) for i in range(parts)], dim=1)]
    return torch.cat(outputs, dim=1).squeeze(0).unflatten(0, x.shape[:2])


def _pass(mlp: timm.layers.Mlp, x: Tensor) -> Tensor:
    x = mlp.drop1(mlp.act(mlp.fc1(x)))
    return mlp.drop2(mlp.fc2(mlp.norm(x)))


def _parts(mlp: timm.layers.Mlp, x: Tensor) -> int:
    """Several where tokens are many, no layer mixes them, and nothing but the result can be seen from outside."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.ndim != 3 or not eager_on_cpu(x):
        return 1
    learning = torch.is_grad_enabled() and x.requires_grad
    if isinstance(mlp, FrozenMlp) and not learning:
        return 1
    if torch.is_grad_enabled() and any(p.requires_grad for p in mlp.parameters()):
        return 1  # the gradients of weights would be summed up part by part
    layers = [mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2]
    watched = any(getattr(global_hooks, f"_global_{kind}_hooks") for kind in _HOOKS)
    if watched or torch._C._len_torch_dispatch_stack() or not all(_by_token(layer) for layer in layers):  # type: ignore[attr-defined]
        return 1
    hidden: int = x.shape[:2].numel() * mlp.fc1.out_features  # type: ignore[assignment, operator]
    return max(1, -(-hidden // (KEPT_AT_ONCE if learning else AT_ONCE)))


def _by_token(layer: nn.Module) -> bool:
    """Whether it is one of those that are known to do the same to each token, and neither changed nor watched."""
    if (
        type(layer) not in _BY_TOKEN
        or "forward" in layer.__dict__
        or any(getattr(layer, f"_{k}_hooks") for k in _HOOKS)
    ):
        return False
    return not (isinstance(layer, nn.Dropout) and layer.training)
