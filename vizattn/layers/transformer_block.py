"""The pre-norm transformer block, with whatever attention it is given."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vizattn.layers.mlp import Mlp

__all__ = ["LayerNorm", "TransformerBlock"]

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each on normalised input and added to it.

    Args:
        dim: Channels C of the tokens.
        attn: The attention, see `vizattn.attention`.
        mlp_ratio: Hidden channels of the MLP, in units of C.
        init_values: Initial layer scale, arXiv:2103.17239; None for no layer scale.
        proj_drop: Dropout rate of the MLP.
        drop_path: Chance that a sample skips the attention, and again the MLP, in training, arXiv:1603.09382.
        norm_layer: The two normalisations, called with C.
        device: Where parameters are created.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid_size: tuple[int, int] = (0, 0)) -> Tensor:
        """(B, N, C) -> (B, N, C). `grid_size` may be left out for an attention that does not use it."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid_size)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
