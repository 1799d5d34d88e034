"""Pretend that the nano ViT is published at an address of ours."""

from __future__ import annotations

import argparse
import dataclasses
import io
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor

import vizattn  # noqa: F401  (registers the backbones)

NAME = "vit_va_nano_patch4_32"
KEY = f"{NAME}.glyphs"


@lru_cache(maxsize=4)
def state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the nano."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: value.shape for key, value in timm.create_model(NAME).state_dict().items()}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@lru_cache(maxsize=4)
def published(seed: int = 0) -> bytes:
    """A checkpoint as training scripts save it."""
    file = io.BytesIO()
    torch.save({"model": state(seed), "epoch": 300, "args": argparse.Namespace(lr=0.1)}, file)
    return file.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, **address: Any) -> PretrainedCfg:
    """Register `address` (`url`, `hf_hub_id`) as the place of the nano's weights."""
    registered = get_pretrained_cfg(NAME)
    assert registered is not None
    cfg = dataclasses.replace(registered, file=None, **address)
    for name in (NAME, KEY):
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, cfg)
    return cfg
