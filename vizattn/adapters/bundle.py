"""Bundles: a folder with `adapter_config.json` and `adapter_model.safetensors`, all that an adapter learnt."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as to_safetensors
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from vizattn.adapters.anatomy import classifiers, core, map_source
from vizattn.adapters.base import METHODS, attach, attached, make_options, replace_head
from vizattn.adapters.edits import Edits, SetAttr
from vizattn.errors import VizattnError, closest
from vizattn.files import checked_file, read_json, write_with_note
from vizattn.heads import Segmenter
from vizattn.heads.build import head_class
from vizattn.version import __version__

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "OWN_WEIGHTS",
    "WEIGHTS_NAME",
    "adapter_state",
    "create_backbone",
    "create_from_bundle",
    "fingerprint",
    "full_name",
    "load_adapter",
    "read_bundle",
    "read_weights",
    "save_adapter",
    "write_bundle",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_NEXT_NAME = f".{WEIGHTS_NAME}.next"  # of an interrupted write, see `write_with_note`
FORMAT_VERSION = 1
OWN_WEIGHTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
"""Options of `timm.create_model` that say where weights come from."""

# A bundle made by somebody else may not say what is read, fetched or written where.
_NOT_IN_A_BUNDLE = (*OWN_WEIGHTS, "cache_dir")


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that differs from the frozen backbone: adapters, heads, trained weights, changed buffers.

    The names are those in ``model.state_dict()``, and the tensors the model's own.
    """
    inner = core(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is inner)
    heads = model.head_state() if isinstance(model, Segmenter) else {}
    return {prefix + name: tensor for name, tensor in _changing(inner).items()} | heads


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The same of a model without what is around it."""
    state = model.state_dict()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = [name for name, _ in classifiers(model)]
    beside_trained = {n.rpartition(".")[0] for n in trained}
    buffers = {n for n, _ in model.named_buffers()}
    everything = any(a.options.trains_backbone for a in attached(model))
    return {
        name: tensor
        for name, tensor in state.items()
        if everything
        or name in trained
        or name.startswith("adapters.")
        or any(name.startswith(f"{head}.") for head in heads)
        or (name in buffers and name.rpartition(".")[0] in beside_trained)
    }


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of the frozen weights; the heads of a `Segmenter` are none of them."""
    model = core(model)
    changing = _changing(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in changing:
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write the bundle of the adapters on `model`; the files appear whole or not at all.

    Args:
        model: A model with adapters attached, or a `Segmenter` on one.
        folder: Created if it is missing.
        class_names: Names of the classes, in the order of the logits.
        preprocessing: How images are prepared; by default what timm says of the model.
        metadata: Anything else worth keeping, as JSON.

    Returns:
        The folder.

    Raises:
        VizattnError: nothing is attached, or the number of names is not the number of classes.
    """
    inner: Any = core(model)
    attachments = attached(inner)
    if not attachments:
        raise VizattnError("Nothing to save: no adapter is attached. Call vizattn.attach(model, ...) first.")
    num_classes = int(getattr(model if isinstance(model, Segmenter) else inner, "num_classes", 0))
    if class_names is not None and len(class_names) != num_classes:
        raise VizattnError(f"{len(class_names)} class names for a head of {num_classes} classes.")
    state = _changing(inner) | (_of_heads(model) if isinstance(model, Segmenter) else {})
    if preprocessing is None:
        preprocessing = {**resolve_model_data_config(inner), "input_size": get_model_input_config(inner)["input_size"]}
    config = {
        "format_version": FORMAT_VERSION,
        "vizattn_version": __version__,
        "backbone": _backbone(inner, map_source(model)),
        "adapters": [{"method": a.method, "options": dataclasses.asdict(a.options)} for a in attachments],
        "segmenter": model.head_config if isinstance(model, Segmenter) else None,
        "num_classes": num_classes,
        "class_names": class_names,
        "preprocessing": preprocessing,
        "fingerprint": fingerprint(inner),
        "metadata": metadata or {},
    }
    return write_bundle(Path(folder), config, state)


def write_bundle(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """Write a bundle of `config`, but for the checksum, and tensors; the files appear whole or not at all."""
    weights = to_safetensors({k: v.detach().cpu().contiguous() for k, v in state.items()})
    folder.mkdir(parents=True, exist_ok=True)
    write_with_note(folder / WEIGHTS_NAME, lambda path: path.write_bytes(weights), folder / CONFIG_NAME, config)
    return folder


def _of_heads(segmenter: Segmenter) -> dict[str, Tensor]:
    """The state of the heads, by the names they have in a bundle."""
    return {f"heads.{name}": tensor for name, tensor in segmenter.head_state().items()}


def _backbone(model: Any, source: nn.Module | None) -> dict[str, Any]:
    """How to create `model` again; `source` is what gives its maps, if it does."""
    cfg = model.pretrained_cfg
    elsewhere = ("num_classes", "features_only", *_NOT_IN_A_BUNDLE)
    args = {
        k: v for k, v in getattr(model if source is None else source, "_model_args", {}).items() if k not in elsewhere
    }
    pool = _pooling(model)
    if pool is not None and source is None:
        args["global_pool"] = pool
    return {
        "name": cfg["architecture"],
        "tag": cfg.get("tag") or None,
        "args": {k: v for k, v in args.items() if _is_plain(v)},
        "args_left_out": sorted(k for k, v in args.items() if not _is_plain(v)),
        "features_only": source is not None,
        "out_indices": None if source is None else list(_own_info(source).out_indices),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _own_info(source: Any) -> Any:
    """The `feature_info` of the backbone's maps, whatever maps its adapters give instead."""
    edits = [e for a in attached(source) for e in a.edits.done if isinstance(e, SetAttr) and e.owner is source]
    return next((e.old for e in edits if e.name == "feature_info"), source.feature_info)


def _pooling(model: Any) -> str | None:
    """The pooling by name, of models that say it themselves or have one of timm's heads."""
    said = getattr(model, "global_pool", None)
    pool = said if isinstance(said, str) else getattr(getattr(model, "head", None), "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return pool if isinstance(pool, str) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def read_bundle(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked `adapter_config.json` of a bundle.

    Raises:
        VizattnError: no bundle there, a damaged or newer one, one that says where its backbone's weights come from, or
            a method that does not exist.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        interrupted = name == WEIGHTS_NAME and (folder / _NEXT_NAME).is_file()
        if not (folder / name).is_file() and not interrupted:
            found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
            raise VizattnError(
                f"{folder} is not a bundle: {name} is missing. A bundle holds {CONFIG_NAME} and {WEIGHTS_NAME}; "
                f"found: {', '.join(found) or 'nothing' if isinstance(found, list) else found}."
            )
    try:
        config = read_json(folder / CONFIG_NAME)
        version = config["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise VizattnError(f"{folder / CONFIG_NAME} is damaged: {error}.") from None
    if not isinstance(version, int):
        raise VizattnError(f"{folder / CONFIG_NAME} is damaged: format_version is {version!r}.")
    if version != FORMAT_VERSION:
        raise VizattnError(
            f"{folder} has bundle format {version}, this vizattn {__version__} reads format {FORMAT_VERSION}: "
            f"upgrade vizattn (the bundle was written by {config.get('vizattn_version', 'an unknown version')})."
        )
    _check_schema(folder, config)
    refused = [key for key in _NOT_IN_A_BUNDLE if key in config["backbone"]["args"]]
    if refused:
        raise VizattnError(
            f"{folder / CONFIG_NAME} has {refused[0]!r} among the arguments of its backbone: a bundle names its "
            f"backbone, but may not say where weights are read, fetched or kept. Do not use it unless you trust who "
            f"made it; then remove the argument, and name a file of weights yourself if it needs one."
        )
    for adapter in config["adapters"]:
        make_options(adapter["method"], adapter["options"])
    if config["segmenter"] is not None:
        head_class(config["segmenter"]["head"])
    return config


_SCHEMA: dict[str, tuple[type, ...]] = {
    "backbone": (dict,),
    "adapters": (list,),
    "segmenter": (dict, type(None)),
    "num_classes": (int,),
    "class_names": (list, type(None)),
    "preprocessing": (dict,),
    "fingerprint": (str,),
    "weights_sha256": (str,),
    "metadata": (dict,),
}


def _check_schema(folder: Path, config: dict[str, Any]) -> None:
    config.setdefault("segmenter", None)  # bundles of classifiers have none
    wrong = [key for key, types in _SCHEMA.items() if not isinstance(config.get(key), types) or key not in config]
    if not wrong:
        backbone, names = config["backbone"], config["class_names"]
        dtype = getattr(torch, str(backbone.setdefault("dtype", "float32")), None)
        left_out = backbone.setdefault("args_left_out", [])
        if not (
            isinstance(backbone.get("name"), str)
            and isinstance(backbone.get("args"), dict)
            and isinstance(backbone.setdefault("tag", None), str | None)
            and isinstance(backbone.get("out_indices"), list | None)
            and isinstance(dtype, torch.dtype)
            and isinstance(left_out, list)
            and all(isinstance(name, str) for name in left_out)
        ):
            wrong.append("backbone")
        for a in config["adapters"]:
            fits = isinstance(a, dict) and isinstance(a.get("method"), str) and isinstance(a.get("options"), dict)
            wrong += [] if fits else ["adapters"]
        if names is not None and (len(names) != config["num_classes"] or not all(isinstance(n, str) for n in names)):
            wrong.append("class_names")
        heads = config["segmenter"]
        if heads is not None and not (
            isinstance(heads.get("head"), str)
            and isinstance(heads.get("auxiliary"), bool)
            and heads.get("num_classes") == config["num_classes"]
            and backbone.get("features_only") is True
        ):
            wrong.append("segmenter")
    if wrong or not config["adapters"]:
        raise VizattnError(f"{folder / CONFIG_NAME} is damaged: look at {', '.join(wrong) or 'adapters'}.")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, keep_original: bool = True) -> nn.Module:
    """Attach the adapters of a bundle to the backbone they were trained on, and load what they learnt.

    The head is replaced where its number of classes differs. On any error the model is left as it was.

    Returns:
        The same object; from the bundle of a `Segmenter`, which loads onto the `features_only` backbone, a new
        `Segmenter` around it.

    Raises:
        VizattnError: no bundle, a damaged or newer one, adapters attached already, or another backbone; the first
            differences are named.
    """
    config = read_bundle(folder)
    if isinstance(model, Segmenter):
        raise VizattnError("Load onto the features_only backbone: vizattn.load_adapter(backbone, ...) makes the heads.")
    inner: Any = core(model)
    if attached(inner):
        raise VizattnError("This model has adapters attached already: call vizattn.detach(model) first.")
    state = read_weights(Path(folder), config)
    _check_backbone(folder, model, config["backbone"])
    head = Edits()
    segmenter = None
    flags = [(p, p.requires_grad) for p in inner.parameters()]
    training = inner.training
    try:
        if map_source(model) is None and getattr(inner, "num_classes", 0) != config["num_classes"]:
            replace_head(inner, config["num_classes"], head)
        for adapter in config["adapters"]:
            _attach(folder, model, adapter, keep_original)
        expected = _changing(inner)
        if config["segmenter"] is not None:
            segmenter = _without_values(folder, model, config["segmenter"])
            expected |= _of_heads(segmenter)
        _check_keys(folder, expected, state)
        if fingerprint(inner) != config["fingerprint"]:
            wanted = config["backbone"]
            raise VizattnError(
                f"{folder} was trained on other weights of {full_name(wanted)}: the fingerprint of the frozen weights "
                f"differs. Create the backbone with the same tag and pretrained=True"
                + (f" and {wanted['args']}." if wanted["args"] else ".")
            )
    except BaseException:
        for a in reversed(attached(inner)):
            a.edits.undo(next(inner.parameters()))
        head.undo(next(inner.parameters()))
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        inner.train(training)
        raise
    with torch.no_grad():
        for key, tensor in _changing(inner).items():
            tensor.copy_(state[key])
    attached(inner)[0].edits.done[:0] = head.done
    if segmenter is None:
        return model
    like = next(inner.parameters())
    heads = {name: state[f"heads.{name}"].to(like.device) for name in segmenter.head_state()}
    segmenter.load_state_dict(heads, strict=False, assign=True)
    return segmenter.train(training)


def _attach(folder: Any, model: nn.Module, adapter: dict[str, Any], keep_original: bool) -> None:
    try:
        attach(model, adapter["method"], keep_original=keep_original, **adapter["options"])
    except VizattnError:
        raise
    except Exception as error:  # such as memory for a number of tokens that nobody trained
        raise VizattnError(
            f"{Path(folder) / CONFIG_NAME} is damaged: no {adapter['method']} can be made with {adapter['options']}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _without_values(folder: Any, backbone: nn.Module, head_config: dict[str, Any]) -> Segmenter:
    """The segmenter on `backbone`, its heads without memory: nothing large is made before the sizes are compared."""
    try:
        with torch.device("meta"):
            return Segmenter(backbone, **head_config)
    except VizattnError:
        raise
    except Exception as error:  # whatever a value of a wrong kind leads to
        raise VizattnError(
            f"{folder / CONFIG_NAME} is damaged: no head can be made from {head_config}: "
            f"{type(error).__name__}: {error}"
        ) from None


def full_name(backbone: dict[str, Any]) -> str:
    """The name of a bundle's backbone with its tag, as timm knows it."""
    return backbone["name"] + (f".{backbone['tag']}" if backbone["tag"] else "")


def _check_backbone(folder: Any, model: Any, wanted: dict[str, Any]) -> None:
    """Raises a VizattnError where `model` is another one than the bundle was trained on."""
    source = map_source(model)
    features_only = source is not None
    model = core(model)
    name = model.pretrained_cfg["architecture"] if getattr(model, "pretrained_cfg", None) else type(model).__name__
    if name != wanted["name"]:
        raise VizattnError(f"{folder} was trained on {full_name(wanted)}, not on {name}.")
    if features_only != bool(wanted.get("features_only")):
        kinds = ("a classifier", "a features_only model")
        raise VizattnError(
            f"{folder} was trained on {kinds[not features_only]}, this is {kinds[features_only]}: create it "
            f"{'without' if features_only else 'with'} features_only=True."
        )
    indices = wanted.get("out_indices")
    if source is not None and indices is not None and indices != list(source.feature_info.out_indices):
        raise VizattnError(
            f"{folder} was trained on the maps {indices} of {full_name(wanted)}, this model gives "
            f"{list(source.feature_info.out_indices)}: create it with out_indices={indices}."
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype != wanted.get("dtype", dtype):
        raise VizattnError(
            f"{folder} was saved from a {wanted['dtype']} model, this one is {dtype}: load it onto {wanted['dtype']}, "
            f"convert the model afterwards."
        )
    pool = None if features_only else _pooling(model)
    if pool is not None and pool != wanted["args"].get("global_pool", pool):
        wanted_pool = wanted["args"]["global_pool"]
        raise VizattnError(
            f"{folder} was trained with global_pool={wanted_pool!r}, this model has {pool!r}: create it with "
            f"global_pool={wanted_pool!r}."
        )


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a bundle by name; `config` is from `read_bundle`.

    Raises:
        VizattnError: they are not those that the config names.
    """
    weights = folder / WEIGHTS_NAME
    path = checked_file(weights, config["weights_sha256"])
    if path is None:
        size = weights.stat().st_size if weights.is_file() else 0
        raise VizattnError(
            f"{weights} is damaged or truncated: its checksum is not the one in {CONFIG_NAME} "
            f"({size:,} bytes found). Copy the whole bundle again."
        )
    try:
        return load_safetensors(path.read_bytes())
    except SafetensorError as error:
        raise VizattnError(f"{folder / WEIGHTS_NAME} is not a safetensors file: {error}.") from None


def _check_keys(folder: Any, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    differences = [f"{k} is missing" for k in expected if k not in state]
    differences += [f"{k} is unexpected" for k in state if k not in expected]
    differences += [
        f"{k} has shape {tuple(state[k].shape)}, the model wants {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    if differences:
        more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
        raise VizattnError(f"{folder} does not fit this model: {'; '.join(differences[:3])}{more}.")


@contextmanager
def _head_from_the_bundle() -> Iterator[None]:
    """No word of the head that is new in the backbone: the bundle brings its own."""
    logger = logging.getLogger("vizattn")

    def other(record: logging.LogRecord) -> bool:
        return "newly initialised" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def create_from_bundle(folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The backbone of a bundle, created by timm with its pretrained weights, with the adapters loaded, in eval mode.

    A `Segmenter` where the bundle is of one.

    Args:
        folder: The bundle.
        weights: A file with the backbone's pretrained weights; by default timm gets them.

    Raises:
        VizattnError: as `load_adapter`, or timm does not know the backbone, or the bundle holds all weights itself.
    """
    return load_adapter(create_backbone(folder, weights), folder, keep_original=False).eval()


def create_backbone(folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The backbone of a bundle with its pretrained weights, without the adapters; as `create_from_bundle`."""
    config = read_bundle(folder)
    backbone = config["backbone"]
    if not timm.is_model(backbone["name"]):
        matches = closest(backbone["name"], timm.list_models())
        raise VizattnError(f"{folder} needs the backbone {backbone['name']!r}, unknown to timm. Close: {matches}.")
    if backbone.get("args_left_out"):
        raise VizattnError(
            f"{folder} does not hold these arguments of its backbone: {', '.join(backbone['args_left_out'])}. Create "
            f"the model with them and call vizattn.load_adapter."
        )
    frozen = not any(METHODS[a["method"]].trains_backbone for a in config["adapters"])
    overlay: dict[str, Any] = {}
    if weights is not None:
        if not frozen:
            raise VizattnError(f"{folder} holds all weights of its backbone: it takes none from {weights}.")
        if not Path(weights).is_file():
            raise VizattnError(f"There is no file of weights {weights}.")
        overlay = {"pretrained_cfg_overlay": {"file": str(weights)}}
    task = {"features_only": True} if backbone.get("features_only") else {"num_classes": config["num_classes"]}
    try:
        with _head_from_the_bundle():
            model = timm.create_model(full_name(backbone), pretrained=frozen, **task, **backbone["args"], **overlay)
        model.to(getattr(torch, backbone["dtype"]))
    except Exception as error:
        raise VizattnError(
            f"{folder} needs {full_name(backbone)}{' with its pretrained weights' if frozen else ''}, which cannot be "
            f"created here: {type(error).__name__}: {error}"
        ) from error
    return model
