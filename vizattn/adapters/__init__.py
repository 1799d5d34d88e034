"""Adapters: parameter-efficient methods that attach to vizattn's and timm's backbones. One file a method."""

from vizattn.adapters.apla import APLA
from vizattn.adapters.base import (
    METHODS,
    attach,
    attached,
    detach,
    disabled,
    list_adapters,
    make_options,
    merge,
    register,
)
from vizattn.adapters.bundle import (
    adapter_state,
    create_from_bundle,
    fingerprint,
    load_adapter,
    read_bundle,
    save_adapter,
)
from vizattn.adapters.bundle_set import BundleSet
from vizattn.adapters.bundle_tools import average_bundles, bundle_summary, compare_bundles
from vizattn.adapters.cached import cache_level, frozen_features, head_from_features
from vizattn.adapters.efficient_probing import EfficientProbing, query_maps
from vizattn.adapters.hst import HST
from vizattn.adapters.plain import Full, LinearProbe
from vizattn.adapters.side_tuning import SideTuning
from vizattn.adapters.summary import TrainableSummary, trainable_summary
from vizattn.adapters.vpt import VPT

__all__ = [
    "APLA",
    "HST",
    "METHODS",
    "VPT",
    "BundleSet",
    "EfficientProbing",
    "Full",
    "LinearProbe",
    "SideTuning",
    "TrainableSummary",
    "adapter_state",
    "attach",
    "attached",
    "average_bundles",
    "bundle_summary",
    "cache_level",
    "compare_bundles",
    "create_from_bundle",
    "detach",
    "disabled",
    "fingerprint",
    "frozen_features",
    "head_from_features",
    "list_adapters",
    "load_adapter",
    "make_options",
    "merge",
    "query_maps",
    "read_bundle",
    "register",
    "save_adapter",
    "trainable_summary",
]
