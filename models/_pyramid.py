"""`forward_intermediates` of the backbones whose stages give maps of falling resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vizattn.errors import VizattnError

__all__ = ["stage_intermediates"]


def stage_intermediates(
    x: Tensor,
    stem: Callable[[Tensor], Tensor],
    stages: nn.Sequential,
    final_norm: Callable[[Tensor], Tensor],
    indices: int | list[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    to_nchw: Callable[[Tensor], Tensor] = lambda x: x,
) -> Any:
    """Run the stages and take the maps after the chosen ones.

    Args:
        x: Images (B, in_chans, height, width).
        stem: What comes before the first stage.
        stages: The stages in order.
        final_norm: The norm after the last stage, on what the stages give.
        indices: Stages to take: a list (negative counts from the end), the last n, or None for all.
        norm: Apply the final norm to the last stage's map, if it is taken; the widths of the others do not fit it.
        stop_early: Do not run stages after the last one taken.
        output_fmt: Only "NCHW".
        intermediates_only: Leave out the final features.
        to_nchw: From what the stages give to (B, C, H, W).

    Returns:
        (final features (B, C, H, W), list of maps (B, C, H, W)), or only the list.

    Raises:
        VizattnError: Another `output_fmt`.
    """
    if output_fmt != "NCHW":
        raise VizattnError(f"output_fmt must be 'NCHW', not {output_fmt!r}.")
    take_indices, last = feature_take_indices(len(stages), indices)
    x = stem(x)
    taken = []
    for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
        x = stage(x)
        if i in take_indices:
            taken.append(to_nchw(final_norm(x) if norm and i == len(stages) - 1 else x))
    if intermediates_only:
        return taken
    if not stop_early or last == len(stages) - 1:
        x = final_norm(x)
    return to_nchw(x), taken
