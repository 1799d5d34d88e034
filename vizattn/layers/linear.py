"""A linear layer that is faster in inference on CPUs."""

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Linear"]


@register_notrace_module  # paths depend on the input
class Linear(nn.Linear):
    """`nn.Linear` on tokens, computed as a 1 x 1 convolution in float32 inference on a CPU.

    PyTorch gives convolutions to oneDNN and products of matrices to MKL, which was half as fast on a CPU with AVX-512
    that is not Intel's (PyTorch 2.14, two threads; with one thread there is no difference). The layouts are the same,
    so nothing is copied. While gradients are recorded, and in compiled and exported graphs, it is the usual layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, in_features) -> (B, N, out_features); other shapes in the usual way."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        if (
            input.ndim == 3
            and input.shape[1] > 0
            and input.dtype == torch.float32
            and input.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            image = input.unsqueeze(1).permute(0, 3, 1, 2)  # (B, C, 1, N), channels last
            return F.conv2d(image, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).squeeze(1)
        return F.linear(input, self.weight, self.bias)
