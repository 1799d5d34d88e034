"""After each attach: can a gradient reach every parameter that is to be trained?"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from vizattn.adapters.anatomy import core
from vizattn.errors import VizattnError

__all__ = ["check_gradients"]


def check_gradients(model: nn.Module, method: str) -> None:
    """Run one image forward and walk the graph behind the output; nothing is computed backward.

    Of a `features_only` model the output is the maps that are read, so that nothing trains beyond the last of them.

    Raises:
        VizattnError: a trainable parameter is not in the graph; the first few are named.
    """
    inner = core(model)
    named = [(n, p) for n, p in inner.named_parameters() if p.requires_grad]
    if not named or any(p.is_meta for _, p in named):
        return
    shape = get_model_input_config(inner)["input_size"]
    training = inner.training
    inner.eval()
    with torch.enable_grad():
        like = named[0][1]
        out = model(torch.zeros(1, *shape, device=like.device, dtype=like.dtype))
    inner.train(training)
    out = list(out.values()) if isinstance(out, dict) else out
    reached = _leaves(list(out) if isinstance(out, (list, tuple)) else [out])
    lost = [n for n, p in named if id(p) not in reached]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise VizattnError(
            f"{method!r} would not train on {type(inner).__name__}: no gradient reaches {', '.join(lost[:3])}{more}."
        )


def _leaves(outputs: list[Tensor]) -> set[int]:
    """Ids of the parameters in the autograd graph behind `outputs`."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo: list[Any] = [o.grad_fn for o in outputs if o.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [n for n, _ in node.next_functions if n is not None]
    return found
