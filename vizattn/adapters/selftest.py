"""After each attach: can a gradient reach every parameter that is to be trained? On fake tensors, so almost for free."""

from __future__ import annotations

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vizattn.errors import VizattnError

__all__ = ["check_gradients"]


def check_gradients(model: nn.Module, method: str) -> None:
    """Run one forward and backward on fake tensors.

    Raises:
        VizattnError: a trainable parameter receives no gradient; the first few are named.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named or any(p.is_meta for _, p in named):
        return
    shape = resolve_model_data_config(model)["input_size"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        like = named[0][1]
        out = model(torch.empty(2, *shape, device=like.device, dtype=like.dtype))
        outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if o.requires_grad]
        grads = torch.autograd.grad([o.sum() for o in outs], [p for _, p in named], allow_unused=True) if outs else []
    lost = [n for (n, _), g in zip(named, grads or [None] * len(named), strict=True) if g is None]
    if lost:
        raise VizattnError(
            f"{method!r} would not train on {type(model).__name__}: no gradient reaches {', '.join(lost[:3])}"
            + (f" and {len(lost) - 3} more." if len(lost) > 3 else ".")
        )
