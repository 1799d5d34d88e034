"""Small layers that several backbones share and `timm.layers` does not have."""

from vizattn.layers.transformer_block import LayerNorm, TransformerBlock

__all__ = ["LayerNorm", "TransformerBlock"]
