"""Reversible changes of a model. A list of them, undone in reverse order, gives back the very same objects.

Nothing here is a closure, so that `copy.deepcopy` of a model (moving averages make one) copies its changes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Edit", "Edits", "SetAttr", "SetHook", "SetValues"]

_MISSING = "<missing>"


@dataclass
class SetAttr:
    """`setattr(owner, name, new)`: a submodule, a plain attribute, the class, or a method overridden on one object."""

    owner: Any
    name: str
    new: Any
    old: Any = field(default=_MISSING, init=False)

    def redo(self) -> None:
        """Make the change."""
        registered = isinstance(self.owner, nn.Module) and self.name in self.owner._modules
        own = registered or self.name == "__class__" or self.name in vars(self.owner)
        self.old = getattr(self.owner, self.name) if own else _MISSING
        setattr(self.owner, self.name, self.new)

    def undo(self) -> None:
        """Take it back."""
        if isinstance(self.old, str) and self.old == _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)


@dataclass
class SetHook:
    """A forward hook, or a hook before forward that sees positional arguments only."""

    owner: nn.Module
    function: Callable[..., Any]
    before: bool
    key: int | None = field(default=None, init=False)

    def redo(self) -> None:
        """Register the hook."""
        register = self.owner.register_forward_pre_hook if self.before else self.owner.register_forward_hook
        self.key = register(self.function).id

    def undo(self) -> None:
        """Remove it."""
        hooks = self.owner._forward_pre_hooks if self.before else self.owner._forward_hooks
        hooks.pop(self.key)  # type: ignore[arg-type]


class SetValues:
    """Keeps the values that some tensors had, and exchanges them with the present ones."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.others = [t.detach().clone() for t in tensors]

    def redo(self) -> None:
        """Exchange the values kept with the present ones."""
        with torch.no_grad():
            for i, tensor in enumerate(self.tensors):
                present = tensor.detach().clone()
                tensor.copy_(self.others[i])
                self.others[i] = present

    undo = redo


class Edit(Protocol):
    """One change."""

    def redo(self) -> None:
        """Make it."""

    def undo(self) -> None:
        """Take it back."""


class Edits:
    """The changes an adapter makes, in order."""

    def __init__(self) -> None:
        self.done: list[Edit] = []

    def set(self, owner: Any, name: str, new: Any) -> None:
        """Set an attribute or submodule."""
        self.make(SetAttr(owner, name, new))

    def before(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call `function(module, args)` before each forward of `module`."""
        self.make(SetHook(module, function, before=True))

    def after(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call `function(module, args, output)` after each forward of `module`."""
        self.make(SetHook(module, function, before=False))

    def note(self, edit: SetAttr, old: Any) -> None:
        """Remember a change that somebody else has made already, and what was there before."""
        edit.old = old
        self.done.append(edit)

    def make(self, edit: Edit) -> None:
        """Make any change and remember it."""
        edit.redo()
        self.done.append(edit)

    def undo(self, like: Tensor) -> None:
        """Take all changes back; modules that were set aside follow the device and type of `like`, a parameter."""
        for edit in reversed(self.done):
            edit.undo()
            if isinstance(edit, SetAttr):
                _follow(edit.old, like)

    def redo(self, like: Tensor) -> None:
        """Make them again."""
        for edit in self.done:
            edit.redo()
            if isinstance(edit, SetAttr):
                _follow(edit.new, like)


def _follow(module: Any, like: Tensor) -> None:
    if isinstance(module, nn.Module) and any(
        p.device != like.device or p.dtype != like.dtype for p in module.parameters()
    ):
        module.to(device=like.device, dtype=like.dtype)
