"""What every family's checkpoint filter needs: unwrap a checkpoint, and say in words why it does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vizattn.errors import VizattnError

__all__ = ["Renames", "check_fit", "rename", "unwrap"]

Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


#: Where training scripts put the weights, the best first where a file has several.
NESTED = ("state_dict_ema", "model", "state_dict", "model_ema")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights inside a checkpoint, in float32 where they were stored in half precision.

    Training scripts nest them, some twice; distributed training begins each key with ``module.``, and compiled models
    begin them with ``_orig_mod.``. Storage types narrower than float32 are widened here so that resizing does not
    round.
    """
    for _ in range(3):  # not for ever: a file may hold itself
        if nested := [key for key in NESTED if isinstance(checkpoint.get(key), dict)]:
            checkpoint = checkpoint[nested[0]]
    for prefix in ("module.", "_orig_mod.", "module."):
        if checkpoint and all(key.startswith(prefix) for key in checkpoint):
            checkpoint = {key.removeprefix(prefix): value for key, value in checkpoint.items()}
    return {
        key: value.float() if value.is_floating_point() and value.itemsize < 4 else value
        for key, value in checkpoint.items()
    }


def rename(key: str, renames: Renames) -> str:
    """`key` after each pattern in turn is replaced as `re.sub` does it."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def check_fit(state_dict: dict[str, Tensor], model: nn.Module, adapted: tuple[str, ...] = ()) -> None:
    """Raise unless `state_dict` holds exactly the model's entries, each in the model's shape.

    timm loads without this check once the number of classes differs, and then leaves what is missing at random.

    Args:
        state_dict: Weights under the model's keys.
        model: The model they are meant for.
        adapted: Beginnings of the keys that timm adapts later: the classifier, which may be missing, and the first
            convolution. Their shapes are not checked.

    Raises:
        VizattnError: Something is missing, unexpected or of another shape; the first of each are named.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith(adapted)}
    given = {key: tuple(value.shape) for key, value in state_dict.items() if not key.startswith(adapted)}
    problems = {
        "missing": [
            key
            for key in model.state_dict()
            if key not in state_dict and not (key.startswith("head.") and key.startswith(adapted))
        ],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [
            f"{key} {given[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in given and given[key] != shape
        ],
    }
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise VizattnError(f"The weights do not fit this {type(model).__name__}: {'; '.join(found)}.")
