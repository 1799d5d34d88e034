"""Several bundles on one frozen backbone: switched without loading it again, and on one batch with one pass of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vizattn.adapters.anatomy import core
from vizattn.adapters.base import METHODS, attached, take_off
from vizattn.adapters.bundle import create_backbone, load_adapter, read_bundle
from vizattn.adapters.cached import cache_level, frozen_features, head_from_features
from vizattn.errors import VizattnError, unknown

__all__ = ["BundleSet"]

Folder = str | os.PathLike[str]


class BundleSet:
    """Several bundles on one backbone, at most one of them attached at a time; not for several threads.

    Args:
        backbone: The one that all were trained on, without adapters, on its device; it is put into evaluation mode.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone.eval()
        self.active: str | None = None
        self._models: dict[str, nn.Module] = {}
        self._put_on: dict[str, Callable[[], None]] = {}
        self._levels: dict[str, str | None] = {}

    @classmethod
    def load(cls, folders: Mapping[str, Folder], weights: Folder | None = None) -> BundleSet:
        """The bundles by name, on the backbone of the first.

        Args:
            folders: The bundles.
            weights: A file with the backbone's pretrained weights; by default timm gets them.

        Raises:
            VizattnError: no bundle, or as `add` and `create_from_bundle`.
        """
        if not folders:
            raise VizattnError("Name at least one bundle.")
        bundles = cls(create_backbone(next(iter(folders.values())), weights))
        for name, folder in folders.items():
            bundles.add(name, folder)
        return bundles

    @property
    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._models)

    def add(self, name: str, folder: Folder) -> None:
        """Load one more bundle onto the backbone; `use` attaches it.

        Raises:
            VizattnError: the name is taken, the bundle holds a whole model, or as `load_adapter`; nothing changes then.
        """
        if name in self._models:
            raise VizattnError(f"There is a bundle {name!r} already: {', '.join(self._models)}.")
        for adapter in read_bundle(folder)["adapters"]:
            if METHODS[adapter["method"]].trains_backbone:
                raise VizattnError(f"{folder} is of {adapter['method']!r}: it is a whole model and shares no backbone.")
        self._rest()
        model = load_adapter(self.backbone, folder).eval()
        self._levels[name] = cache_level(model)
        self._models[name] = model
        self._put_on[name] = take_off(core(self.backbone))

    def use(self, name: str) -> nn.Module:
        """The model with this bundle attached and the one before taken off; a `Segmenter` where the bundle is of one.

        Only adapters and heads move, and they stay in memory. What an earlier call returned has the same backbone
        inside: from now on it is this model, too, or a `Segmenter` that does not fit.

        Raises:
            VizattnError: there is no such bundle.
        """
        if name not in self._models:
            raise unknown("bundle", name, self._models)
        if name != self.active:
            self._rest()
            self._put_on.pop(name)()
            self.active = name
        return self._models[name].eval()

    @torch.no_grad()
    def logits(self, images: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Logits (B, classes) of several bundles for one batch (B, C, H, W), by name; the same numbers as one by one.

        The backbone runs once for all linear probes, and once for all efficient probes, which read it before its last
        norm. No other method allows this: prompts and changed weights are inside the backbone, side networks read
        every block, and of segmenters each reads maps in its own way.

        Args:
            images: Prepared as all of them need it.
            names: By default all.

        Raises:
            VizattnError: no such bundle, or one whose method changes the features; nothing is computed then.
        """
        chosen = list(self._models if names is None else names)
        for name in chosen:
            if name not in self._models:
                raise unknown("bundle", name, self._models)
            if self._levels[name] is None:
                fitting = ", ".join(sorted(method for method, m in METHODS.items() if m.cache_level))
                methods = "+".join(a.method for a in attached(self.use(name)))
                raise VizattnError(
                    f"The bundle {name!r} ({methods}) cannot share a pass of the backbone, which only classifiers by "
                    f"{fitting} do: use({name!r}) switches to it."
                )
        features: dict[str | None, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name in chosen:
            model: Any = self.use(name)
            level = self._levels[name]
            if level not in features:
                features[level] = frozen_features(model, images)
            found[name] = head_from_features(model, features[level])
        return found

    def _rest(self) -> None:
        """Take off what is attached."""
        if self.active is not None:
            self._put_on[self.active] = take_off(core(self.backbone))
            self.active = None
