"""The MLP of transformer blocks, which in inference on a CPU does not write all hidden channels to memory."""

import timm.layers
import torch
from torch import Tensor, nn

from vizattn.layers.linear import in_inference

__all__ = ["Mlp"]

#: Hidden channels of all tokens of a part at most, 16 MB: of much more, the pages are new to the process each time.
AT_ONCE = 1 << 22


class Mlp(timm.layers.Mlp):
    """timm's. In float32 inference on a CPU, many tokens pass through it some at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_features) -> (B, N, out_features); other shapes in the usual way."""
        parts = 1 if torch.jit.is_scripting() else self._parts(x)
        if parts == 1:
            return self._pass(x)
        outputs = [self._pass(part) for part in x.flatten(0, 1).tensor_split(parts)]
        return torch.cat(outputs).unflatten(0, x.shape[:2])

    def _pass(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def _parts(self, x: Tensor) -> int:
        """Several where tokens are many, and nothing but the result can be seen from outside."""
        if not isinstance(x, Tensor) or self.training or x.ndim != 3 or not in_inference(x):
            return 1
        layers = [self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2]
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return 1
        if (
            not isinstance(self.fc1, nn.Linear)
            or not isinstance(self.fc2, nn.Linear)
            or type(self.norm) is not nn.Identity
        ):
            return 1
        return -(-x.shape[:2].numel() * self.fc1.out_features // AT_ONCE)
