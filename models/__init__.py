"""The backbones, one family a file. Importing this package registers them all into timm."""

from . import agent_deit  # noqa: F401  (sizes of VisionTransformer)
from .agent_cswin import AgentCSwin
from .agent_pvt import AgentPVT
from .agent_swin import AgentSwin
from .biformer import BiFormer
from .efficientvit import EfficientViT
from .halonet import HaloNet
from .l2vit import L2ViT
from .nat import NeighborhoodTransformer
from .vit import VisionTransformer

__all__ = [
    "AgentCSwin",
    "AgentPVT",
    "AgentSwin",
    "BiFormer",
    "EfficientViT",
    "HaloNet",
    "L2ViT",
    "NeighborhoodTransformer",
    "VisionTransformer",
]
