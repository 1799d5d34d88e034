"""Linear attention with ReLU as its feature map, and the convolution that makes up for what it blurs.

The Linear Attention Resurrection in Vision Transformer (Zheng), arXiv:2501.16182. Keys and values are summed up in one
d x d matrix a head, so the cost grows linearly with the number of tokens.

Shapes: B batch, H x W patch tokens, P prefix tokens, N = P + H * W, E extra keys, M = N + E keys, h heads, d channels
a head, C = h * d.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import register_notrace_module  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention.linear_native import attend_linear
from vizattn.attention.native import LANES, ready
from vizattn.errors import VizattnError
from vizattn.layers.eager import derived_again, eager, gradients_of

__all__ = ["LinearAttention", "LocalConcentration", "linear_attention"]


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None = None, min_sum: float = 100.0
) -> Tensor:
    """temperature * sum_m w(n, m) value(m) / max(sum_m w(n, m), min_sum), with w = ReLU(query) . ReLU(key).

    Computed in float32 at least, under autocast too: the sums over many tokens overflow half precision.
    Time is O((N + M) C d), memory O((N + M) C).

    Args:
        query: (B, h, N, d).
        key: (B, h, M, d).
        value: (B, h, M, e).
        temperature: A factor a head, (h, 1, 1); none if None.
        min_sum: Sums of weights below this one are replaced by it; with few tokens, that is most of them.

    Returns:
        (B, h, N, e), in the type of `value`.
    """
    if torch.jit.is_scripting():
        return _linear_attention(query, key, value, temperature, min_sum)
    else:
        return _in_eager_mode(query, key, value, temperature, min_sum)


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None, min_sum: float) -> Tensor:
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    query, key = F.relu(query.to(wide)), F.relu(key.to(wide))
    context = key.transpose(-2, -1) @ value.to(wide)
    if temperature is not None:
        context = context * temperature
    total = query @ key.sum(dim=2).unsqueeze(-1)  # (B, h, N, 1)
    return (query @ context / total.clamp(min=min_sum)).to(value.dtype)


@torch.jit.unused
def _in_eager_mode(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None, min_sum: float) -> Tensor:
    if _by_library(query, key, value, temperature):
        return attend_linear(query, key, value, temperature, min_sum, _linear_attention)
    device_type = query.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _by_torch(query, key, value, temperature, min_sum)
    return _by_torch(query, key, value, temperature, min_sum)


def _by_library(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None) -> bool:
    if not ready(query, key, value, temperature):
        return False
    return _fit(query.shape, key.shape, value.shape, None if temperature is None else temperature.shape)


@functools.lru_cache(maxsize=256)
def _fit(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], temperature: tuple[int, ...] | None
) -> bool:
    """Whether shapes are those of `linear_attention`, and the library's; nothing being broadcast."""
    if not len(query) == len(value) == 4 or temperature not in (None, (query[1], 1, 1)):
        return False
    alike = key == (*query[:2], value[2], query[3]) and key[:3] == value[:3]
    return alike and all(channels and channels % LANES == 0 for channels in (query[3], value[3]))


def _by_torch(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None, min_sum: float) -> Tensor:
    inputs = [x for x in (query, key, value, temperature) if x is not None]
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    wide = value.dtype in (torch.float32, torch.float64) and all(x.dtype == value.dtype for x in inputs)
    function = _Attend.apply if learning and wide and eager(*inputs) else _linear_attention
    return function(query, key, value, temperature, min_sum)


class _Attend(torch.autograd.Function):
    """The same in training: fewer passes over the tokens than by the derivatives of each operation."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None, min_sum: float
    ) -> Tensor:
        asking, asked = F.relu(query), F.relu(key)
        context = asked.transpose(-2, -1) @ value
        scaled = context if temperature is None else context * temperature
        mixer = torch.cat([scaled, asked.sum(dim=2).unsqueeze(-1)], dim=-1)
        mixed = asking @ mixer  # (B, h, N, e + 1), the last channel being the sum of weights
        total = mixed[..., -1:].clone()
        out = mixed[..., :-1] / total.clamp(min=min_sum)
        ctx.save_for_backward(query, key, value, temperature, asking, asked, context, mixer, total, out)
        ctx.min_sum = min_sum
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # somebody may call backward inside autocast
            query, key, value, temperature, asking, asked, context, mixer, total, out = ctx.saved_tensors
            if derived_again(grad):
                plain = functools.partial(_linear_attention, min_sum=ctx.min_sum)
                return *gradients_of(plain, (query, key, value, temperature), grad), None
            d_mixed = grad.new_empty(*grad.shape[:-1], grad.shape[-1] + 1)
            d_out = torch.div(grad, total.clamp(min=ctx.min_sum), out=d_mixed[..., :-1])
            d_mixed[..., -1:] = (d_out * out).sum(-1, keepdim=True).neg_().mul_(total >= ctx.min_sum)
            d_query = d_mixed @ mixer.transpose(-2, -1)
            d_scaled, d_sums = (asking.transpose(-2, -1) @ d_mixed).split([value.shape[-1], 1], dim=-1)
            d_context = d_scaled if temperature is None else d_scaled * temperature
            d_key = (value @ d_context.transpose(-2, -1)).add_(d_sums.transpose(-2, -1))
            return (
                torch.ops.aten.threshold_backward(d_query, asking, 0),
                torch.ops.aten.threshold_backward(d_key, asked, 0),
                asked @ d_context,
                None if temperature is None else (d_scaled * context).sum_to_size(temperature.shape),
                None,
            )


@register_notrace_module
class LinearAttention(nn.Module):
    """Multi-head ReLU linear attention over all tokens; prefix tokens are tokens like all others.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`.
        grid_size: Not used: no parameter depends on it.
        num_prefix_tokens: Not used either.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries and keys are normalised a head, before the ReLU.
        attn_drop: Not used: there are no attention weights that could be dropped.
        proj_drop: Dropout rate of the output.
        norm_layer: The normalisation for `qk_norm`, called with the channels a head.
        min_sum: Lower bound of the sum of a query's weights, see `linear_attention`.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, or `min_sum` is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        min_sum: float = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        if min_sum <= 0:
            raise VizattnError(f"min_sum of linear attention must be positive, not {min_sum}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.min_sum = min_sum

        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), self.head_dim**-0.5, **dd))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set the temperature back."""
        nn.init.constant_(self.temperature, self.head_dim**-0.5)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C); every token may attend to `extra_kv`, each (B or 1, h, E, d), besides."""
        B, N, C = x.shape
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        value = value.transpose(1, 2)
        if extra_kv is not None:
            key = torch.cat([key, extra_kv[0].to(key.dtype).expand(B, -1, -1, -1)], dim=2)
            value = torch.cat([value, extra_kv[1].to(value.dtype).expand(B, -1, -1, -1)], dim=2)
        x = linear_attention(query, key, value, self.temperature, self.min_sum)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class LocalConcentration(nn.Module):
    """Two depthwise convolutions with GELU and BatchNorm between them: (B, C, H, W) -> the same.

    Linear attention spreads its weights; this mixes neighbours again.

    Args:
        dim: Channels C.
        kernel_size: Height and width of the kernels, odd.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.conv2(self.bn(self.act(self.conv1(x))))
