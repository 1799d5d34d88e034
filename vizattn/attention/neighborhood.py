"""Neighborhood attention: every token attends to the k x k tokens around it.

NAT, arXiv:2204.07143; dilated (DiNAT), arXiv:2209.15001; strided and causal (generalized), arXiv:2504.16922.

Along an axis of length L, with dilation D, position i lies in the residue class i mod D and is its (i // D)-th
position; it attends to k positions of that class, around it. At a border the window is shifted inward: there are always
k keys and no padding. With an even k there is one key more on the left. Stride s makes s positions in a row share the
window of the middle one (s = k: blocks). A causal axis has the last k positions up to the query itself, fewer at its
beginning. Several axes are their product.

Shapes: B batch, X, Y, Z sizes of the grid, N its tokens, P prefix tokens, h heads, d channels a head, C = h * d.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import register_notrace_module, trunc_normal_  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vizattn.attention import native
from vizattn.attention.neighborhood_dense import attend_dense
from vizattn.attention.neighborhood_fused import attend_fused
from vizattn.attention.neighborhood_native import attend_neighborhoods
from vizattn.attention.neighborhood_plain import attend_naive, attend_plain
from vizattn.attention.neighborhood_tiles import Axis, tile_scores
from vizattn.errors import VizattnError, unknown
from vizattn.layers.eager import eager

__all__ = ["NeighborhoodAttention", "fitting_axis", "na1d", "na2d", "na3d"]

BACKENDS = ("auto", "native", "natten", "reference", "tiled")

#: Attention over all tokens, masked, is faster than tiles on a CPU if it has at most so many times their scores; and
#: so many tokens, as masks grow with their square.
DENSE_RATIO, DENSE_TOKENS = 3, 400


def na1d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], **options: Any) -> Tensor:
    """Neighborhood attention over (B, X, h, d); see `na2d`."""
    return _neighborhood(1, query, key, value, kernel_size, **options)


def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], **options: Any) -> Tensor:
    """Neighborhood attention over (B, X, Y, h, d).

    Time grows with the tokens N times the keys of a window: O(N C k^2), about two times that for k = 7 where tiles of
    4 x 4 queries share 10 x 10 keys ("native"), three times by 8 x 4 queries that share 14 x 10 ("tiled"). Memory
    beyond the tokens' is that of one tile, or of one row of tiles, which is all of them along a single axis; the
    reference takes O(N C k^2).

    Args:
        query: (B, X, Y, h, d), as in the natten library.
        key: Same shape.
        value: Same shape.
        kernel_size: Keys k of a window, at least 2; here and below one value, or one for each axis.
        **options: ``stride`` s from 1 to k (default 1), ``dilation`` (1; at most length / k), ``is_causal`` (False),
            ``scale`` of the scores (d ** -0.5), ``rpb`` learnt biases (h, 2 * k - 1, 2 * k - 1) by (key - query) /
            dilation + k - 1 along each axis (None), ``additional_keys`` and ``additional_values`` (B, E, h, d) that
            every query attends to besides (None), and ``backend``: "native" (the library that was compiled with
            vizattn, if there was a compiler: float32 on a CPU, d a multiple of 16), "tiled" (dense products over tiles
            of queries; any device), "natten" (that library's kernels: CUDA, installed, no `rpb`), "reference" (copies
            each window; slow), or "auto": natten or native where possible, reference for tensors without data, all
            tokens by all behind a mask where the map is small and `rpb` gets no gradient, else tiled.

    Returns:
        (B, X, Y, h, d).

    Raises:
        VizattnError: An option out of its range, tensors of other shapes, or a backend that cannot do this.
    """
    return _neighborhood(2, query, key, value, kernel_size, **options)


def na3d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], **options: Any) -> Tensor:
    """Neighborhood attention over (B, X, Y, Z, h, d); see `na2d`."""
    return _neighborhood(3, query, key, value, kernel_size, **options)


def _neighborhood(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    function = f"na{axes}d"
    if query.ndim != axes + 3 or query.shape != key.shape or query.shape != value.shape:
        raise VizattnError(
            f"{function}: query, key and value must have one shape (B, {', '.join('XYZ'[:axes])}, heads, channels), "
            f"not {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if (additional_keys is None) != (additional_values is None):
        raise VizattnError(f"{function}: additional_keys and additional_values go together.")
    grid, (h, d) = query.shape[1:-2], query.shape[-2:]
    if additional_keys is not None and additional_values is not None:
        of_keys, of_values = additional_keys.shape, additional_values.shape
        if of_keys != of_values or len(of_keys) != 4 or of_keys[0] not in (1, len(query)) or of_keys[2:] != (h, d):
            raise VizattnError(
                f"{function}: additional_keys and additional_values must have one shape ({len(query)}, E, {h}, {d}), "
                f"not {tuple(of_keys)} and {tuple(of_values)}."
            )
    options = [
        _each(axes, name, option, function)
        for name, option in zip(
            ("kernel_size", "stride", "dilation", "is_causal"), (kernel_size, stride, dilation, is_causal)
        )
    ]
    windows = tuple(
        _checked(Axis(L, int(k), int(s), int(r), bool(c), int(k) - 1), f"{function}, axis {i}")
        for i, (L, k, s, r, c) in enumerate(zip(grid, *options))
    )
    table = (h, *(2 * axis.kernel - 1 for axis in windows))
    if rpb is not None and rpb.shape != table:
        raise VizattnError(f"{function}: rpb must have the shape {table}, not {tuple(rpb.shape)}.")
    scale = d**-0.5 if scale is None else scale

    asked, backend = backend, _chosen(backend, query, key, value, rpb, function)
    if backend == "natten":
        return _natten(function)(
            query,
            key,
            value,
            kernel_size=tuple(axis.kernel for axis in windows),
            stride=tuple(axis.stride for axis in windows),
            dilation=tuple(axis.dilation for axis in windows),
            is_causal=tuple(axis.causal for axis in windows),
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )
    query, key, value = (x.flatten(1, axes) for x in (query, key, value))
    if additional_keys is not None and additional_values is not None:
        key = torch.cat([additional_keys.to(key.dtype).expand(len(key), -1, -1, -1), key], dim=1)
        value = torch.cat([additional_values.to(key.dtype).expand(len(key), -1, -1, -1), value], dim=1)
    if asked != "reference" and eager(query, key, value, rpb):
        return _attend_fast(rpb, windows, scale, asked, query, key, value).unflatten(1, grid)
    # The queries of additional keys are never used.
    query = torch.cat([key[:, : key.shape[1] - query.shape[1]], query], dim=1)
    return _attend(torch.stack([query, key, value], dim=2), rpb, windows, scale, backend).unflatten(1, grid)


def _each(axes: int, name: str, option: Any, function: str) -> tuple[Any, ...]:
    """One value for each axis."""
    if isinstance(option, int):
        return (option,) * axes
    if len(option) != axes:
        raise VizattnError(f"{function}: {name} must be one value or {axes}, not {tuple(option)}.")
    return tuple(option)


def _checked(axis: Axis, where: str) -> Axis:
    if axis.kernel < 2:
        raise VizattnError(f"{where}: kernel_size must be at least 2, not {axis.kernel}.")
    if not 1 <= axis.stride <= axis.kernel:
        raise VizattnError(f"{where}: stride must be from 1 to the kernel size {axis.kernel}, not {axis.stride}.")
    if axis.dilation < 1 or axis.kernel * axis.dilation > axis.length:
        raise VizattnError(
            f"{where}: kernel_size {axis.kernel} times dilation {axis.dilation} must fit into the length {axis.length}."
        )
    return axis


def fitting_axis(length: int, kernel: int, stride: int, dilation: int, causal: bool) -> Axis:
    """The neighborhoods on a map of any length: where they do not fit, first the dilation is lowered to what does, then
    the window to the map. The biases are still those of the same offsets."""
    window = min(kernel, length)
    return Axis(length, window, min(stride, window), max(min(dilation, length // window), 1), causal, kernel - 1)


@functools.cache
def _natten(function: str) -> Callable[..., Tensor]:
    import natten

    return getattr(natten, function)


@functools.cache
def _natten_usable() -> bool:
    """Whether natten is installed with its kernels; without them it is slower than the tiles."""
    if not torch.cuda.is_available() or importlib.util.find_spec("natten") is None:
        return False
    import natten

    return bool(getattr(natten, "HAS_LIBNATTEN", False))


def _chosen(backend: str, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, function: str) -> str:
    if backend not in BACKENDS:
        raise unknown(f"backend of {function}", backend, BACKENDS)
    reasons: dict[str, bool] = {}
    if backend == "natten":
        reasons = {
            "the tensors are not on CUDA": not query.is_cuda,
            "it has no relative position bias (rpb)": rpb is not None,
            "natten with its CUDA kernels is not installed": not _natten_usable(),
        }
    elif backend == "native":
        reasons = {
            "vizattn was installed without a C++ compiler, or VIZATTN_NATIVE is 0": native.library is None,
            f"it takes float32 on a CPU, with a multiple of {native.LANES} channels a head": not native.takes(
                query, key, value
            ),
        }
    for reason, holds in reasons.items():
        if holds:
            raise VizattnError(f"{function}: backend {backend!r} cannot be used here: {reason}.")
    if backend != "auto":
        return backend
    if query.is_meta:
        return "reference"
    return "natten" if query.is_cuda and rpb is None and _natten_usable() else "tiled"


def _attend(
    qkv: Tensor,
    rpb: Tensor | None,
    windows: tuple[Axis, ...],
    scale: float,
    backend: str = "auto",
    dropout_p: float = 0.0,
) -> Tensor:
    """(B, E + N, 3, h, d) -> (B, N, h, d), with every tensor operation that we have and no library."""
    if backend == "reference" or qkv.is_meta:
        return attend_naive(qkv, rpb, windows, scale)
    if dropout_p == 0 and eager(qkv, rpb):
        return _attend_fast(rpb, windows, scale, backend, qkv)
    return attend_plain(qkv, rpb, windows, scale, dropout_p)


def _attend_fast(rpb: Tensor | None, windows: tuple[Axis, ...], scale: float, backend: str, *tokens: Tensor) -> Tensor:
    """By tiles, or all at once where the map is small; torch's kernel for that has no gradient of biases."""
    if backend in ("auto", "native") and native.usable(*tokens):
        return attend_neighborhoods(rpb, windows, scale, *tokens)
    dtype = tokens[0].dtype
    if backend == "auto" and dtype in (torch.bfloat16, torch.float16) and native.usable(*tokens, dtype=dtype):
        return attend_neighborhoods(rpb, windows, scale, *[x.float() for x in tokens]).to(dtype)
    N = math.prod(axis.length for axis in windows)
    small = backend != "tiled" and N <= DENSE_TOKENS and DENSE_RATIO * tile_scores(windows) >= N * N
    if not small or (rpb is not None and rpb.requires_grad and torch.is_grad_enabled()):
        return attend_fused(rpb, windows, scale, *tokens)
    query, key, value = tokens[0].unbind(2) if len(tokens) == 1 else tokens
    with torch.autocast(query.device.type, enabled=False):
        return attend_dense(rpb, windows, scale, query[:, query.shape[1] - N :], key, value)


def _attend_grid(
    qkv: Tensor,
    rpb: Tensor | None,
    grid_size: tuple[int, int],
    options: tuple[tuple[int, int, int, bool], ...],
    scale: float,
    dropout_p: float,
    extra: int,
) -> Tensor:
    """(B, E + P + H * W, 3, h, d), E of them without outputs -> (B, P + H * W, h, d), on a map of any size."""
    windows = tuple(fitting_axis(L, *option) for L, option in zip(grid_size, options))
    patches = _attend(qkv, rpb, windows, scale, dropout_p=dropout_p)
    before = qkv.shape[1] - patches.shape[1]
    if before == extra:
        return patches
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    prefix = F.scaled_dot_product_attention(query[:, :, extra:before], key, value, dropout_p=dropout_p, scale=scale)
    return torch.cat([prefix.transpose(1, 2), patches], dim=1)


@register_notrace_module  # tiles depend on the size of the map
class NeighborhoodAttention(nn.Module):
    """Multi-head self-attention of each token of a grid to its neighborhood, and to all prefix tokens; prefix tokens
    attend to everything. On a map too small for the window, dilation and then window are lowered (`fitting_axis`).

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads h; must divide `dim`.
        kernel_size: Keys of a window, along both axes or one for each.
        dilation: Distance between the keys of a window, likewise.
        stride: Queries in a row that share a window, likewise.
        is_causal: Whether an axis has no keys behind the query, likewise.
        rel_pos_bias: Whether offsets have learnt biases, `rpb` (h, 2 * k - 1, 2 * k - 1).
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_norm: Whether queries and keys are normalised a head, arXiv:2302.05442.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        norm_layer: The normalisation for `qk_norm`, called with the channels a head.

    Raises:
        VizattnError: `num_heads` does not divide `dim`, or an option is out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        is_causal: bool | tuple[bool, bool] = False,
        rel_pos_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VizattnError(f"dim {dim} cannot be split into {num_heads} heads.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        where = "neighborhood attention"
        named = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
        kernels, strides, dilations, causal = (_each(2, name, option, where) for name, option in named.items())
        for i, (k, s, r, c) in enumerate(zip(kernels, strides, dilations, causal)):
            _checked(Axis(k * max(r, 1), k, s, r, c, k - 1), f"{where}, axis {i}")
        self.kernel_size, self.dilation = kernels, dilations
        self.options = (
            (kernels[0], strides[0], dilations[0], causal[0]),
            (kernels[1], strides[1], dilations[1], causal[1]),
        )

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.qk_norm = qk_norm
        table = (num_heads, *(2 * k - 1 for k in kernels))
        self.rpb = nn.Parameter(torch.empty(table, **dd)) if rel_pos_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the position biases anew."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def project_kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, P, d) of normed tokens (B, P, C), for `extra_kv`."""
        C = tokens.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[C:]
        kv = F.linear(tokens, self.qkv.weight[C:], bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value

    @torch.jit.ignore
    def _mix(self, qkv: Tensor, grid_size: tuple[int, int], extra: int) -> Tensor:
        dropout_p = self.attn_drop.p if self.training else 0.0
        return _attend_grid(qkv, self.rpb, grid_size, self.options, self.scale, dropout_p, extra)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, P + H * W, C) -> same; every token may attend to `extra_kv`, each (B or 1, h, E, d), besides.

        `grid_size` (H, W) is needed; it is optional only so that blocks can be compiled for any attention.
        """
        assert grid_size is not None, "neighborhood attention needs grid_size"
        B, M, C = x.shape
        qkv = self.qkv(x).reshape(B, M, 3, self.num_heads, self.head_dim)
        if self.qk_norm:
            query, key, value = qkv.unbind(2)
            qkv = torch.stack([self.q_norm(query), self.k_norm(key), value], dim=2)
        extra = 0
        if extra_kv is not None:
            extra = extra_kv[0].shape[2]
            added = torch.stack([extra_kv[0], extra_kv[0], extra_kv[1]]).permute(1, 3, 0, 2, 4)  # queries: never used
            qkv = torch.cat([added.to(qkv.dtype).expand(B, -1, -1, -1, -1), qkv], dim=1)
        x = self._mix(qkv, grid_size, extra)
        return self.proj_drop(self.proj(x.reshape(B, M, C)))
