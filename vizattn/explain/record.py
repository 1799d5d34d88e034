"""Maps of all attentions of a model, from what they were given in one forward.

Normal forwards are not touched: hooks exist for the one forward that is recorded, and are taken off again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vizattn.adapters.anatomy import core, describe
from vizattn.adapters.efficient_probing import EfficientProbe
from vizattn.adapters.timm_maps import heads_enter
from vizattn.attention import mechanism_maps  # noqa: F401  (registers the mechanisms)
from vizattn.attention.maps import AttentionCall, AttentionMap, map_of
from vizattn.errors import VizattnError

__all__ = ["Recording", "attention_maps", "read", "record", "uncompiled"]


@dataclass
class Recording:
    """What was seen of one attention in a forward."""

    name: str
    attn: Any
    block: Any
    args: dict[str, Any] | None = None
    """The attention's arguments by name; None if it did not run."""
    block_shape: tuple[int, ...] = ()
    """Of the input of its block."""
    heads: Tensor | None = None
    """What its heads gave, side by side, in the graph of the forward if there is one."""


def attention_maps(model: nn.Module, image: Tensor) -> list[AttentionMap]:
    """The maps of all attentions of a model, in the order of its layers.

    Maps are those of evaluation mode, with the adapters that are attached: prompts are further keys, and the queries of
    efficient probing make the last map. Weights are computed when a map is asked for them. No other thread may run the
    model meanwhile.

    Args:
        model: A backbone of vizattn or one of timm's transformers, or a `Segmenter` on one.
        image: (C, height, width) or (B, C, height, width), as the model takes it.

    Raises:
        VizattnError: The model has attentions whose maps are not known, or none at all.
    """
    model, images = uncompiled(model), image[None] if image.ndim == 3 else image
    with torch.no_grad(), record(model) as recordings:
        model(images)
    with torch.no_grad(), _evaluation(model):
        return read(model, recordings, images)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` gives."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def read(model: nn.Module, recordings: list[Recording], images: Tensor) -> list[AttentionMap]:
    """The map of each recording that ran; `model` is in evaluation mode."""
    patches: Any = getattr(core(model), "patch_embed", None)
    tokens = hasattr(core(model), "blocks") and hasattr(patches, "dynamic_feat_size")
    grid = tuple(patches.dynamic_feat_size(images.shape[-2:])) if tokens else (0, 0)
    maps: list[AttentionMap] = []
    for seen in recordings:
        if seen.args is None:
            continue
        options = dict(seen.args)
        x = options.pop("x")
        given = options.pop("grid_size", None)
        if given is None and tokens:
            given = grid
        elif given is None:  # windows of a block's map (B, H, W, C), or a probe of the last map
            given = seen.block_shape[1:3] or maps[-1].query_grid
        adapter: Any = getattr(vars(seen.attn).get("forward"), "__self__", None)
        call = AttentionCall(
            x=x,
            grid_size=(int(given[0]), int(given[1])),
            extra_kv=adapter.extra_kv(1) if hasattr(adapter, "extra_kv") else None,
            inserted=getattr(adapter, "count", 0),
            options=options,
            block=seen.block,
        )
        maps.append(replace(map_of(seen.attn, call), name=seen.name))
    return maps


@contextmanager
def record(model: nn.Module, heads: bool = False) -> Iterator[list[Recording]]:
    """Record what the attentions of `model` are given by the first forward inside, in evaluation mode.

    Args:
        model: See `attention_maps`.
        heads: Whether to keep what the heads gave, too, with its graph.

    Raises:
        VizattnError: See `attention_maps`.
    """
    recordings = _attentions(model)
    handles = []
    try:
        for seen in recordings:
            watched = _Watched(seen)
            if isinstance(seen.attn, EfficientProbe):
                # By this method, as its module is not always called.
                seen.attn.attention = watched.attention  # type: ignore[method-assign]
            else:
                handles.append(seen.attn.register_forward_pre_hook(watched.arguments, with_kwargs=True))
                handles.append(seen.block.register_forward_pre_hook(watched.shape))
            if heads and isinstance(seen.attn, EfficientProbe):
                handles.append(seen.attn.register_forward_hook(watched.output))
            elif heads:
                handles.append(heads_enter(seen.attn).register_forward_pre_hook(watched.heads))
        with _evaluation(model), torch.compiler.set_stance("force_eager"):  # compiled code does not see new hooks
            yield recordings
    finally:
        for handle in handles:
            handle.remove()
        for seen in recordings:
            if isinstance(seen.attn, EfficientProbe):
                vars(seen.attn).pop("attention", None)  # the class's own again


class _Watched:
    """Keeps what passes in the first forward: gradient checkpointing may run parts again."""

    def __init__(self, seen: Recording) -> None:
        self.seen = seen

    def arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen.args is None:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            kept = {k: v.detach() if isinstance(v, Tensor) else v for k, v in bound.items() if k != "self"}
            self.seen.args = kept

    def shape(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen.block_shape = tuple(args[0].shape)

    def heads(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.seen.heads is None:
            self.seen.heads = args[0]

    def output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen.heads = output

    def attention(self, tokens: Tensor) -> Tensor:
        self.seen.args = {"x": tokens.detach()}
        return EfficientProbe.attention(self.seen.attn, tokens)


def _attentions(model: nn.Module) -> list[Recording]:
    inner = core(model)
    nobody = map_of.dispatch(nn.Module)
    found = [
        Recording(name, module, inner.get_submodule(name.rpartition(".")[0]))
        for name, module in inner.named_modules()
        if map_of.dispatch(type(module)) is not nobody
    ]
    readable = {id(recording.attn) for recording in found}
    # Side networks look at the backbone, not at the image.
    beside = {id(module) for module in getattr(inner, "adapters", nn.Module()).modules()}
    odd: set[str] = set()
    try:
        blocks = [block for block in describe(model).blocks if id(block.block) not in beside]
        odd = {type(block.attn).__name__ for block in blocks if id(block.attn) not in readable}
        known = not odd
    except VizattnError:
        known = False
    if not known:
        kind = type(inner).__name__.removeprefix("Adapted")
        why = f" (its attention is {', '.join(sorted(odd))})" if odd else ""
        raise VizattnError(
            f"No attention maps are known of {kind}{why}. They are of vizattn's backbones, and of "
            "timm's VisionTransformer, Eva, Beit, SwinTransformer and SwinTransformerV2."
        )
    return found


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode of every module, whatever mode each was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
