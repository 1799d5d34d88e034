"""Registration into timm that never replaces a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from timm.models import is_model, model_entrypoint
from timm.models import register_model as timm_register_model
from torch import nn

from vizattn.errors import VizattnError

__all__ = ["register_model"]

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
