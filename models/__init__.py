"""The backbones, one family a file. Importing this package registers them all into timm."""

from .vit import VisionTransformer

__all__ = ["VisionTransformer"]
