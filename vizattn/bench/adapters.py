"""Adapters beside full fine-tuning, naive formulations of the same, and peft's LoRA.

A training step is forward, backward and AdamW over what the method trains, as a loop of one's own would do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.models import is_model
from torch import Tensor, nn

import vizattn
from vizattn.adapters import frozen_features, head_from_features
from vizattn.bench import peers
from vizattn.bench.backbones import channels, create
from vizattn.bench.case import DTYPES, Case, Options, Unavailable, Work, autocast
from vizattn.bench.ops import text_of
from vizattn.bench.variants import check_variants
from vizattn.errors import VizattnError, unknown

__all__ = ["METHODS", "Method", "cases", "insert_prompts"]

CLASSES = 100


class Method(NamedTuple):
    """How a model is made ready: by one of ours (`attach` with these options), or by a function of its own."""

    attach: str | Callable[..., Any]
    options: dict[str, Any]
    cached: bool = False
    """Whether the frozen features are computed beforehand."""


def insert_prompts(model: Any, num_tokens: int) -> Any:
    """Deep prompts (2203.12119) by their definition: tokens put in before every block and taken out after it."""
    if not hasattr(model, "blocks") or getattr(model, "num_prefix_tokens", 0) != 1:
        raise Unavailable("for ViTs with one class token")
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    for block in model.blocks:
        block.prompts = nn.Parameter(torch.empty(num_tokens, model.embed_dim).uniform_(-0.06, 0.06))
        block.register_forward_pre_hook(_put_in)
        block.register_forward_hook(_take_out)
    return model.eval()  # as an attached adapter keeps the frozen parts


def _put_in(block: Any, args: tuple[Tensor]) -> Tensor:
    x = args[0]
    return torch.cat([x[:, :1], block.prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)


def _take_out(block: Any, args: tuple[Tensor], x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, 1 + len(block.prompts) :]], dim=1)


def freeze(model: Any) -> Any:
    """Nothing is trained: the floor of what has no gradient in the backbone."""
    return model.requires_grad_(False).eval()


METHODS: dict[str, Method] = {
    "full": Method("full", {}),
    "frozen forward": Method(freeze, {}),
    "linear_probe": Method("linear_probe", {}),
    "efficient_probing": Method("efficient_probing", {}),
    "vpt p=50": Method("vpt", {"num_tokens": 50}),
    "vpt p=50, inserted as tokens": Method(insert_prompts, {"num_tokens": 50}),
    "apla r=8": Method("apla", {"num_rows": 8}),
    "apla r=128": Method("apla", {"num_rows": 128}),
    "hst": Method("hst", {}),
    "side_tuning": Method("side_tuning", {}),
    "peft lora r=8": Method(peers.lora, {"rank": 8}),
    "linear_probe, cached": Method("linear_probe", {}, cached=True),
    "efficient_probing, cached": Method("efficient_probing", {}, cached=True),
}


def build(name: str, case: str, mode: str, batch: int, size: tuple[int, int], dtype: str, compiled: bool) -> Work:
    """A training step of a method, or a forward pass of the adapted model in eval mode."""
    method = METHODS[case]
    torch.manual_seed(0)
    model: Any = create(name, size, num_classes=CLASSES)
    if isinstance(method.attach, str):
        try:
            vizattn.attach(model, method.attach, keep_original=False, **method.options)
        except VizattnError as reason:
            raise Unavailable(str(reason)) from reason
        model.train()
    else:
        model = method.attach(model, **method.options)
    model = model.to(DTYPES[dtype])
    inputs = torch.randn(batch, channels(name), *size).to(DTYPES[dtype])
    forward: Callable[[Tensor], Tensor] = model
    if method.cached:
        inputs = torch.cat([frozen_features(model, image[None]) for image in inputs])
        forward = functools.partial(head_from_features, model)
    called: Any = torch.compile(forward) if compiled else forward
    if mode == "forward":
        model.eval()
        return _forward(forward, called, inputs, dtype)
    return _training(model, forward, called, inputs, dtype)


def _forward(forward: Any, called: Any, inputs: Tensor, dtype: str) -> Work:
    def step(call: Any) -> Tensor:
        with torch.inference_mode(), autocast(dtype):
            return call(inputs)

    return Work(lambda: step(called), counted=lambda: step(forward), images=len(inputs))


def _training(model: nn.Module, forward: Any, called: Any, inputs: Tensor, dtype: str) -> Work:
    labels = torch.arange(len(inputs)) % CLASSES
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step(call: Any) -> Tensor:
        with autocast(dtype):
            loss = nn.functional.cross_entropy(call(inputs).float(), labels)
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss

    return Work(lambda: step(called), counted=lambda: step(forward), images=len(inputs))


def cases(options: Options) -> list[Case]:
    """Each method on each backbone, at each shape."""
    check_variants(options.variants, ("eager", "compile"))
    found = []
    for name in options.models or ("vit_base_patch16_224",):
        if not is_model(name):
            raise unknown("backbone", name, timm.list_models(), "vizattn list --timm")
        cfg = timm.get_pretrained_cfg(name)
        native = (224, 224) if cfg is None else (cfg.input_size[1], cfg.input_size[2])
        for size in options.sizes or (native,):
            for batch in options.batches or (16,):
                for dtype in options.dtypes:
                    for mode in options.modes or ("train",):
                        found += _comparison(name, mode, batch, size, dtype, options.variants)
    return found


def _comparison(
    name: str, mode: str, batch: int, size: tuple[int, int], dtype: str, variants: tuple[str, ...]
) -> list[Case]:
    return [
        Case(
            group="adapters",
            subject=name,
            name=case,
            build=functools.partial(build, name, case, mode, batch, size, dtype, variant == "compile"),
            mode=mode,
            batch=batch,
            size=text_of(size),
            dtype=dtype,
            variant=variant,
            reference=case == "full" and variant == variants[0],
            ours=isinstance(method.attach, str) and case != "full",
        )
        for variant in variants
        for case, method in METHODS.items()
    ]
