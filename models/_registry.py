"""Registration into timm that never replaces a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timm.models import is_model, model_entrypoint
from timm.models import register_model as timm_register_model
from torch import nn

from vizattn.errors import VizattnError

__all__ = ["register_model", "register_sizes"]

Entrypoint = TypeVar("Entrypoint", bound=Callable[..., nn.Module])


def register_model(entrypoint: Entrypoint) -> Entrypoint:
    """`timm.models.register_model`, but a name somebody else has registered is an error.

    timm itself only warns, and then erases the other model's weights and configuration.

    Raises:
        VizattnError: The name is taken.
    """
    name = entrypoint.__name__
    # The same module may run twice (importlib.reload): it replaces its own.
    if is_model(name) and model_entrypoint(name).__module__ != entrypoint.__module__:
        raise VizattnError(
            f"Cannot register {name!r} from {entrypoint.__module__}: "
            f"the name is taken by {model_entrypoint(name).__module__}."
        )
    timm_register_model(entrypoint)
    return entrypoint


def register_sizes(module: str, sizes: Mapping[str, Any], create: Callable[..., nn.Module]) -> None:
    """Register each name of a family's size table, as a function of that name in the family's module.

    Args:
        module: `__name__` of the family's module, whose `default_cfgs` timm reads.
        sizes: The table; its keys are the names.
        create: Called as ``create(name, pretrained, **kwargs)``.

    Raises:
        VizattnError: A name is taken.
    """
    for name in sizes:
        entrypoint = _entrypoint(module, name, create)
        setattr(sys.modules[module], name, entrypoint)
        register_model(entrypoint)


def _entrypoint(module: str, name: str, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    entrypoint.__doc__ = f"{name}, see `SIZES`."
    return entrypoint
