"""What a model looks at: attention maps, rollout, and relevance, computed on request from one forward."""

from vizattn.attention.maps import AttentionMap
from vizattn.explain.flow import relevance, rollout
from vizattn.explain.record import attention_maps

__all__ = ["AttentionMap", "attention_maps", "relevance", "rollout"]
