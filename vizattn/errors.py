"""Mistakes a user can make, told in one message: what, where, what is allowed, and the closest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["VizattnError", "closest", "unknown"]

_LONGEST = 200
"""Characters of a name that are looked at: a damaged file may hold any."""


class VizattnError(ValueError):
    """A user's mistake. The command line prints its message, without a traceback, and exits with status 2."""


def closest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The `n` entries of `choices` that look most like `name`, best first."""
    return difflib.get_close_matches(str(name)[:_LONGEST], sorted(choices), n=n, cutoff=0.5)


def unknown(kind: str, name: object, choices: Iterable[str], how_to_list: str | None = None) -> VizattnError:
    """The error for a name that does not exist.

    Args:
        kind: What was named, e.g. ``"adapter"``.
        name: The name that was given.
        choices: All names that exist.
        how_to_list: A command or call that lists them; without it the choices themselves are shown.
    """
    choices = sorted(choices)
    message = f"Unknown {kind} {str(name)[:_LONGEST]!r}."
    matches = closest(str(name), choices)
    if matches:
        message += f" Did you mean {' or '.join(repr(m) for m in matches)}?"
    listed = ", ".join(repr(choice) if "," in choice else choice for choice in choices)
    message += f" List them with: {how_to_list}" if how_to_list else f" Choose from: {listed}."
    return VizattnError(message)
