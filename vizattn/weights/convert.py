"""Released weights under our keys, in a safetensors file that says where they come from."""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, model_entrypoint
from torch import Tensor, nn

from vizattn.errors import VizattnError
from vizattn.files import check_regular, replacing, told_in_words

__all__ = [
    "FORMAT_VERSION",
    "converted",
    "fitted",
    "metadata_of",
    "released",
    "save_converted",
    "save_released",
    "tensors_digest",
]

FORMAT_VERSION = 1
"""Rises when a family's keys change: what older versions converted is then fetched anew."""


def _native_model(cfg: PretrainedCfg) -> nn.Module:
    """The model that `cfg`'s weights were trained for, at their size, on the meta device: shapes without values."""
    create = model_entrypoint(str(cfg.architecture))
    with torch.device("meta"):
        model = create(pretrained=False, pretrained_cfg=cfg)
        if "img_size" in inspect.signature(type(model)).parameters:
            model = create(pretrained=False, pretrained_cfg=cfg, img_size=cfg.input_size[-2:])
    return model


def _family(cfg: PretrainedCfg) -> Any:
    """The module of the model's family."""
    return sys.modules[model_entrypoint(str(cfg.architecture)).__module__]


def fitted(checkpoint: dict[str, Any], model: nn.Module, filter_fn: Callable[..., Any]) -> dict[str, Tensor]:
    """What a family's `checkpoint_filter_fn` makes of a checkpoint for `model`.

    Raises:
        VizattnError: It is no checkpoint of this model; what differs is named.
    """
    try:
        state: dict[str, Tensor] = filter_fn(checkpoint, model)
    except VizattnError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:  # not a state dict
        raise VizattnError(
            f"This is no checkpoint of {type(model).__name__}: {type(error).__name__}: {error}. "
            f"It has {', '.join(map(str, [*checkpoint][:3])) or 'nothing'}{', ...' if len(checkpoint) > 3 else ''}."
        ) from error
    like = model.state_dict()
    odd = [
        f"{key} ({str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')})"
        for key, value in state.items()
        if value.layout != torch.strided
        or value.is_quantized
        or value.is_complex()
        or (key in like and like[key].is_floating_point() and not value.is_floating_point())
    ]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise VizattnError(f"These weights of {type(model).__name__} are not plain numbers: {odd[0]}{more}.")
    return state


def converted(checkpoint: dict[str, Any], cfg: PretrainedCfg) -> dict[str, Tensor]:
    """A checkpoint of a release as weights of our model, complete and in its shapes.

    Raises:
        VizattnError: It is of another model; what differs is named.
    """
    model = _native_model(cfg)
    state = fitted(checkpoint, model, _family(cfg).checkpoint_filter_fn)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reasons = "; ".join(line.strip().rstrip(".") for line in str(error).splitlines()[1:])
        raise VizattnError(f"The weights do not fit {cfg.architecture}: {reasons}.") from error
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def released(checkpoint: dict[str, Any], cfg: PretrainedCfg) -> dict[str, Any]:
    """`converted` and back: weights of our model, or a release's, as the release has them.

    Its names, shapes and nesting, and the tables that its code computes and stores: that code loads them strictly.

    Raises:
        VizattnError: The weights are of another model, or nobody else published any for it.
    """
    if not (cfg.hf_hub_id or cfg.url):
        raise VizattnError(f"{cfg.architecture}.{cfg.tag} has only our own weights: no other layout to go back to.")
    layout: dict[str, Any] = _family(cfg).released_layout(converted(checkpoint, cfg), _native_model(cfg), cfg)
    return layout


def save_released(checkpoint: dict[str, Any], path: Path) -> None:
    """Write what `released` gives, whole: by torch where weights are nested, else as the name's ending says.

    Raises:
        VizattnError: A nested checkpoint, and a name ending in ``.safetensors``.
        OSError: It cannot be written.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    nested = any(isinstance(value, dict) for value in checkpoint.values())
    if nested and path.suffix == ".safetensors":
        raise VizattnError(f"This release nests its weights in a file of torch, end {path.name} in .pth.")

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value.contiguous().clone()

    with replacing(path) as temporary, told_in_words(path):
        if path.suffix == ".safetensors":
            save_file(plain(checkpoint), temporary, metadata={"format": "pt"})
        else:
            buffer = io.BytesIO()  # torch hides why it cannot write to a file
            torch.save(plain(checkpoint), buffer)
            temporary.write_bytes(buffer.getbuffer())


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_converted(state: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write the file whole, with `metadata`, the format version and a digest of the tensors.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors.torch import save_file

    notes = {"format": "pt", "format_version": str(FORMAT_VERSION), "tensors_sha256": tensors_digest(state), **metadata}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, told_in_words(path):
        save_file(state, temporary, metadata=notes)


def metadata_of(path: Path) -> dict[str, str] | None:
    """What `save_converted` noted; None where the file is missing, damaged, or of another format version."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return notes if notes.get("format_version") == str(FORMAT_VERSION) else None
