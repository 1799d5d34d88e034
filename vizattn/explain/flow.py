"""How attention flows from the pixels to the answer, through all layers: rollout, and relevance weighted by gradients.

Shapes: B batch, h heads, N tokens, K keys, H x W grid, e channels of a head's values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vizattn.adapters import attached
from vizattn.adapters.anatomy import core
from vizattn.attention.maps import AttentionMap
from vizattn.errors import VizattnError
from vizattn.explain.record import attention_maps, read, record, uncompiled
from vizattn.heads import Segmenter

__all__ = ["relevance", "rollout"]

#: Adapters whose answer comes from a network beside the backbone.
BESIDE = ("hst", "side_tuning")


@torch.no_grad()
def rollout(model: nn.Module, image: Tensor) -> Tensor:
    """Attention rollout, arXiv:2005.00928: the product over the layers of (A + I) / 2, A the mean over heads.

    Read where the model reads: at the class token, at the mean of the patch tokens, or by the weights of the learnt
    queries that pool the tokens. Prompts of an adapter take their share and pass nothing on. For attentions without a
    softmax the weights of each head are brought to sum one first.

    Args:
        model: A token model (one grid throughout), see `attention_maps`.
        image: (C, height, width) or (B, C, height, width).

    Returns:
        (B, H, W).

    Raises:
        VizattnError: A pyramid, or an adapter whose answer comes from a side network.
    """
    model = uncompiled(model)
    _check(model, "rollout")
    maps = attention_maps(model, image)
    layers, pooling = _split(maps)
    total: Tensor | None = None
    for layer in layers:
        weights = torch.cat([_shares(layer, w).mean(1) for _, w in layer.chunks()], dim=1)  # B, N, K
        weights = weights[..., : layer.queries]
        step = (weights + torch.eye(layer.queries, dtype=weights.dtype, device=weights.device)) / 2
        total = step if total is None else step @ total
    assert total is not None
    row = _read_row(model, layers[-1], total, [p.weights().mean((1, 2)) for p in pooling])
    return layers[-1].on_grid(row)


def relevance(model: nn.Module, image: Tensor, target: int | Tensor | None = None) -> Tensor:
    """What spoke for a class: attention weighted by its gradient, arXiv:2103.15679.

    R begins as the identity; each layer adds mean over heads of max(0, dy/dA * A) times R, with y the logit of the
    class. The gradient of weights that no kernel has ever stored is that of the heads' outputs times the values.

    Args:
        model: A classifier that is a token model, see `attention_maps`. Its parameters get no gradient.
        image: (C, height, width) or (B, C, height, width).
        target: The class, or one for each image (B,); by default the likeliest.

    Returns:
        (B, H, W), not negative.

    Raises:
        VizattnError: A pyramid, a segmenter, a model without classes, an adapter whose answer comes from a side
            network, or a class that does not exist.
    """
    model = uncompiled(model)
    _check(model, "relevance")
    with torch.inference_mode(False):
        return _relevance(model, (image[None] if image.ndim == 3 else image).detach().clone().requires_grad_(), target)


def _relevance(model: nn.Module, images: Tensor, target: int | Tensor | None) -> Tensor:
    """Of images that require a gradient."""
    with record(model, heads=True) as recordings:
        with torch.enable_grad():
            logits = model(images)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or not getattr(core(model), "num_classes", 0):
                raise VizattnError("relevance needs a model that classifies; this one gives features.")
            chosen = _classes(logits, target)
            ran = [seen for seen in recordings if seen.args is not None]
            score = logits.gather(1, chosen[:, None]).sum()
            grads = torch.autograd.grad(score, [seen.heads for seen in ran if seen.heads is not None])
        with torch.no_grad():
            maps = read(model, ran, images)
            layers, pooling = _split(maps)
            by_name = dict(zip((m.name for m in maps), grads, strict=True))
            identity = torch.eye(layers[0].queries, dtype=logits.dtype, device=logits.device)
            total = identity.expand(len(logits), -1, -1)
            for layer in layers:
                total = total + _positive(layer, by_name[layer.name])[..., : layer.queries].to(total.dtype) @ total
            rows = [_positive(p, by_name[p.name]).sum(1) for p in pooling]
            return layers[-1].on_grid(_read_row(model, layers[-1], total if rows else total - identity, rows))


def _shares(layer: AttentionMap, weights: Tensor) -> Tensor:
    """The weights of each query and head, brought to sum one where there are any."""
    if layer.kind != "linear":
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _positive(layer: AttentionMap, grad: Tensor) -> Tensor:
    """Mean over heads of max(0, dy/dA * A), (B, Q, K); `grad` is that of the heads side by side, (B, Q, h * e)."""
    grad = grad.reshape(layer.batch, layer.queries, layer.heads, -1).transpose(1, 2)
    values = layer.values.to(grad.dtype).transpose(2, 3)
    parts = [(weights * (grad[:, :, i] @ values)).clamp(min=0).mean(1) for i, weights in layer.chunks()]
    return torch.cat(parts, dim=1)


def _classes(logits: Tensor, target: int | Tensor | None) -> Tensor:
    if target is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.numel() != 1 and chosen.shape != logits.shape[:1]:
        raise VizattnError(f"target must be one class, or one for each of the {len(logits)} images, not {target}.")
    chosen = chosen.flatten().expand(len(logits))
    if chosen.dtype.is_floating_point or bool(((chosen < 0) | (chosen >= logits.shape[1])).any()):
        raise VizattnError(f"target must be a class from 0 to {logits.shape[1] - 1}, not {target}.")
    return chosen.long()


def _check(model: nn.Module, what: str) -> None:
    inner: Any = core(model)
    if not hasattr(inner, "blocks"):
        kind = type(inner).__name__.removeprefix("Adapted")
        raise VizattnError(
            f"{what} follows tokens through layers of one grid, which {kind}, a pyramid, has not; "
            "attention_maps shows the maps of its layers."
        )
    if isinstance(model, Segmenter) and what == "relevance":
        raise VizattnError("relevance explains a class of an image; a segmenter has one for each position.")
    for attachment in attached(model):
        if attachment.method in BESIDE:
            raise VizattnError(
                f"{what} explains what the backbone's last tokens say, but with {attachment.method!r} the answer comes "
                "from a network beside it."
            )


def _split(maps: list[AttentionMap]) -> tuple[list[AttentionMap], list[AttentionMap]]:
    """The layers through which tokens pass, and what pools them at the end."""
    layers = [m for m in maps if m.query_grid != (0, 0)]
    return layers, [m for m in maps if m.query_grid == (0, 0)]


def _read_row(model: nn.Module, last: AttentionMap, total: Tensor, pooling: list[Tensor]) -> Tensor:
    """What the features read from the tokens of the first layer (B, N).

    Args:
        model: Its pooling decides.
        last: The last layer.
        total: (B, N, N), of tokens after the last layer over those before the first.
        pooling: Weights of learnt queries (B, K) over the model's last tokens, or over the first few and the patches.
    """
    inner: Any = core(model)
    first = last.prefix - int(inner.num_prefix_tokens)  # after the tokens of an adapter
    if pooling:
        area = last.grid[0] * last.grid[1]
        weights = pooling[-1].to(total.dtype)
        row = total.new_zeros(total.shape[:2])
        row[:, -area:] = weights[:, -area:]
        row[:, first : first + weights.shape[1] - area] = weights[:, :-area]
        return (row[:, None] @ total)[:, 0]
    if inner.global_pool == "token" or (not inner.global_pool and getattr(inner, "cls_token", None) is not None):
        count = 2 if getattr(inner, "head_dist", None) is not None else 1  # distilled: the mean of two heads
        return total[:, first : first + count].mean(1)
    return total[:, last.prefix :].mean(1)
