"""The MLP of transformer blocks, which in inference on a CPU does not write all hidden channels to memory."""

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from vizattn.layers.linear import Linear, in_inference

__all__ = ["Mlp"]

#: Hidden channels of all tokens of a part at most, 16 MB: of much more, the pages are new to the process each time.
AT_ONCE = 1 << 22

_BY_TOKEN = (nn.Linear, Linear, nn.GELU, nn.ReLU, nn.SiLU, nn.Dropout, nn.Identity)


class Mlp(timm.layers.Mlp):
    """timm's. In float32 inference on a CPU, many tokens pass through it some at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_features) -> (B, N, out_features); other shapes in the usual way."""
        parts = 1 if torch.jit.is_scripting() else self._parts(x)
        if parts == 1:
            return self._pass(x)
        outputs = [self._pass(part) for part in x.flatten(0, 1).unsqueeze(0).tensor_split(parts, dim=1)]
        return torch.cat(outputs, dim=1).squeeze(0).unflatten(0, x.shape[:2])

    def _pass(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def _parts(self, x: Tensor) -> int:
        """Several where tokens are many, no layer mixes them, and nothing but the result can be seen from outside."""
        if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.ndim != 3 or not in_inference(x):
            return 1
        layers = [self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2]
        watched = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks
        if watched or torch._C._len_torch_dispatch_stack() or not all(_by_token(layer) for layer in layers):  # type: ignore[attr-defined]
            return 1
        hidden: int = x.shape[:2].numel() * self.fc1.out_features  # type: ignore[assignment, operator]
        return max(1, -(-hidden // AT_ONCE))


def _by_token(layer: nn.Module) -> bool:
    """Whether it is one of those that are known to do the same to each token, and neither changed nor watched."""
    if type(layer) not in _BY_TOKEN or layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return False
    return not (isinstance(layer, nn.Dropout) and layer.training)
