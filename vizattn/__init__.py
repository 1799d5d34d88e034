"""Attention backbones registered into timm, and parameter-efficient adapters for them and for timm's own models."""

from vizattn import models
from vizattn.adapters import (
    attach,
    create_from_bundle,
    detach,
    disabled,
    list_adapters,
    load_adapter,
    merge,
    save_adapter,
    trainable_summary,
)
from vizattn.errors import VizattnError
from vizattn.explain import attention_maps, relevance, rollout
from vizattn.fuse import fuse
from vizattn.heads import Segmenter
from vizattn.version import __version__

__all__ = [
    "Segmenter",
    "VizattnError",
    "__version__",
    "attach",
    "attention_maps",
    "create_from_bundle",
    "detach",
    "disabled",
    "fuse",
    "list_adapters",
    "load_adapter",
    "merge",
    "models",
    "relevance",
    "rollout",
    "save_adapter",
    "trainable_summary",
]
