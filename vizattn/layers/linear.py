"""A linear layer and a 1 x 1 convolution that are faster in inference on CPUs.

PyTorch gives convolutions to oneDNN and products of matrices to MKL. The two do the same where no pixel is mixed with
another, and the layouts are the same, so either can stand in for the other and nothing is copied.
"""

import functools
import platform
from pathlib import Path

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Linear", "PointwiseConv", "eager_on_cpu", "in_inference"]

#: From so many tokens on, oneDNN was as fast as MKL on an Intel CPU, too.
MANY = 4096


@functools.cache
def _mkl_is_faster() -> bool:
    """As it was for small maps on an Intel CPU, and was not on one of another maker: PyTorch 2.14, two threads.

    `vizattn bench backbones --only efficientvit` shows it beside timm's models, whose convolutions are always oneDNN's.
    """
    cpus = Path("/proc/cpuinfo")
    maker = cpus.read_text() if cpus.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in maker


def in_inference(x: Tensor) -> bool:
    """As `eager_on_cpu`, and not while gradients are recorded."""
    return not torch.is_grad_enabled() and eager_on_cpu(x)


def eager_on_cpu(x: Tensor) -> bool:
    """Of float32, and not in compiled and exported graphs, which have the usual layer."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    )


@register_notrace_module  # paths depend on the input
class Linear(nn.Linear):
    """`nn.Linear` on tokens; in float32 inference on a CPU as a 1 x 1 convolution, on Intel's where tokens are many."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, in_features) -> (B, N, out_features); other shapes in the usual way."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        if (
            input.ndim == 3
            and in_inference(input)
            and (input.shape[0] * input.shape[1] >= MANY or not _mkl_is_faster())
        ):
            image = input.unsqueeze(1).permute(0, 3, 1, 2)  # (B, C, 1, N), channels last
            return F.conv2d(image, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).squeeze(1)
        return F.linear(input, self.weight, self.bias)


@register_notrace_module  # paths depend on the input
class PointwiseConv(nn.Conv2d):
    """`nn.Conv2d` with 1 x 1 kernels; in float32 inference on an Intel CPU, as a product of matrices.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        bias: Whether a number is added to each channel.
        device: Where parameters are created.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W), in the same layout."""
        if torch.jit.is_scripting():
            return F.conv2d(input, self.weight, self.bias)
        if input.ndim == 4 and in_inference(input) and _mkl_is_faster():
            weight = self.weight.flatten(1)
            if input.is_contiguous():
                output = torch.matmul(weight, input.flatten(2)).unflatten(2, input.shape[2:])
                return output if self.bias is None else output.add_(self.bias.view(-1, 1, 1))
            if input.is_contiguous(memory_format=torch.channels_last):
                return F.linear(input.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)
        return F.conv2d(input, self.weight, self.bias)
