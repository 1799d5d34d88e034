"""Attention backbones registered into timm, and parameter-efficient adapters for them and for timm's own models."""

from vizattn import models
from vizattn.errors import VizattnError
from vizattn.version import __version__

__all__ = ["VizattnError", "__version__", "models"]
