"""Small layers that several backbones share and `timm.layers` does not have."""

from vizattn.layers.conv_norm import ConvNorm, PooledNorm
from vizattn.layers.linear import Linear, PointwiseConv
from vizattn.layers.mlp import Mlp
from vizattn.layers.transformer_block import LayerNorm, TransformerBlock

__all__ = ["ConvNorm", "LayerNorm", "Linear", "Mlp", "PointwiseConv", "PooledNorm", "TransformerBlock"]
