"""The groups of measurements by name, and the choice among their cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vizattn.bench import adapters, backbones, data, ops, startup
from vizattn.bench.case import Case, Options
from vizattn.errors import VizattnError, unknown

__all__ = ["GROUPS", "Group", "cases_of"]


@dataclass(frozen=True)
class Group:
    """A set of measurements."""

    about: str
    cases: Callable[[Options], list[Case]]
    takes: tuple[str, ...]
    """The fields of `Options` that it heeds."""


_MODEL = ("models", "modes", "batches", "sizes", "dtypes", "variants")
GROUPS = {
    "ops": Group("attention ops", ops.cases, (*_MODEL[1:], "heads", "dim")),
    "backbones": Group("backbones, in units of resnet50's time", backbones.cases, _MODEL),
    "adapters": Group("adapters, in units of full fine-tuning", adapters.cases, _MODEL),
    "startup": Group("imports, the command line, creating models", startup.cases, ()),
    "data": Group("loading images, in units of decoding them", data.cases, ("batches", "sizes")),
}


def cases_of(group: str, options: Options, only: Sequence[str] = ()) -> list[Case]:
    """The cases of a group, in the order in which they are measured.

    Args:
        group: A key of `GROUPS`.
        options: What to measure.
        only: Keep cases of whose subject or name any of these is a part; the reference of a comparison always stays.

    Raises:
        VizattnError: An unknown group, an option the group does not have, or `only` leaves nothing.
    """
    if group not in GROUPS:
        raise unknown("group", group, GROUPS)
    default = Options(folder=options.folder)
    for name in vars(options):
        if name not in GROUPS[group].takes and getattr(options, name) != getattr(default, name):
            raise VizattnError(
                f"The group {group} has no choice of {name}; it has {', '.join(GROUPS[group].takes) or 'none'}."
            )
    cases = GROUPS[group].cases(options)
    if not only:
        return cases
    kept, alone = [], []
    for _, together in groupby(cases, key=lambda case: case.comparison):
        members = list(together)
        named = [case for case in members if any(text in f"{case.subject}: {case.name}" for text in only)]
        if all(case.reference for case in named):  # compared with nothing
            alone += named
        else:
            kept += [case for case in members if case in named or case.reference]
    kept = kept or alone
    if not kept:
        subjects = {case.subject for case in cases} | {case.name for case in cases}
        raise unknown(f"subject of {group}", " ".join(only), subjects)
    return kept
