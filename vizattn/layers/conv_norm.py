"""BatchNorm: behind a convolution or linear layer, of pooled features, and folded into its neighbour for inference."""

from typing import Any

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.layers.linear import PointwiseConv

__all__ = ["ConvNorm", "LinearNorm", "PooledNorm", "fold_after", "fold_before"]


def _scale_shift(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """The BatchNorm with its running statistics as ``x * scale + shift``, each (C,), at least in float32."""
    assert norm.running_mean is not None and norm.running_var is not None
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    mean, var = norm.running_mean.to(wide), norm.running_var.to(wide)
    scale = (var + norm.eps).rsqrt() if norm.weight is None else norm.weight.to(wide) / (var + norm.eps).sqrt()
    shift = -mean * scale if norm.bias is None else norm.bias.to(wide) - mean * scale
    return scale, shift


@torch.no_grad()
def fold_after(layer: nn.Conv2d | nn.Linear, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Change `layer` in place so that it computes ``norm(layer(x))`` with the running statistics of `norm`."""
    scale, shift = _scale_shift(norm)
    weight, dtype = layer.weight, layer.weight.dtype
    bias = shift if layer.bias is None else layer.bias.to(scale.dtype) * scale + shift
    folded = weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(folded.to(dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=weight.requires_grad)


@torch.no_grad()
def fold_before(norm: nn.modules.batchnorm._BatchNorm, layer: nn.Linear) -> None:
    """Change `layer` in place so that it computes ``layer(norm(x))`` with the running statistics of `norm`."""
    scale, shift = _scale_shift(norm)
    weight, dtype = layer.weight, layer.weight.dtype
    bias = weight.to(scale.dtype) @ shift
    if layer.bias is not None:
        bias = bias + layer.bias.to(scale.dtype)
    layer.weight = nn.Parameter((weight.to(scale.dtype) * scale).to(dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=weight.requires_grad)


class ConvNorm(nn.Sequential):
    """``bn(conv(x))``: (B, in_chs, H, W) -> (B, out_chs, H', W').

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Of the convolution.
        padding: Zeros around the map; None for ``kernel_size // 2``, which keeps the size at stride 1 and odd kernels.
        groups: Of the convolution; `in_chs` for a depthwise one.
        bn_weight_init: Initial scale of the norm; 0 makes a residual branch begin as nothing.
        bias: Whether the convolution has a bias of its own (which the norm makes superfluous).
        device: Where parameters are created.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bn_weight_init: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = kernel_size // 2 if padding is None else padding
        self.conv: nn.Conv2d
        if kernel_size == stride == groups == 1 and padding == 0:
            self.conv = PointwiseConv(in_chs, out_chs, bias=bias, **dd)
        else:
            self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=bias, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The one convolution that this pair is in inference; changes `conv` in place."""
        fold_after(self.conv, self.bn)
        return self.conv


class LinearNorm(nn.Sequential):
    """``bn(linear(x))``: (R, in_chs) -> (R, out_chs). A 1 x 1 `ConvNorm` on rows, quicker for few of them."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_chs, out_chs, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(out_chs, device=device, dtype=dtype)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The one linear layer that this pair is in inference; changes `linear` in place."""
        fold_after(self.linear, self.bn)
        return self.linear


@register_notrace_module  # what it does depends on the batch
class PooledNorm(nn.BatchNorm2d):
    """BatchNorm of pooled maps, (B, C, 1, 1) -> the same.

    A single image has no statistics: in training it is normed by the running ones, where `nn.BatchNorm2d` refuses it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        several = self.training and input.numel() > input.shape[1]
        if several and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, self.weight, self.bias, several, self.momentum or 0.0, self.eps)
