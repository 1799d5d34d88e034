"""Bundles and trained models for the Hugging Face hub: `prepare` writes the folder with its card, `upload` sends it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from vizattn.adapters import METHODS, read_bundle
from vizattn.adapters.bundle import CONFIG_NAME, WEIGHTS_NAME
from vizattn.engine.card import GENERATED, Subject, card
from vizattn.errors import VizattnError
from vizattn.files import checked_file, replacing, write_text
from vizattn.version import __version__

__all__ = ["exported", "prepare", "upload"]

NO_LICENCE = "none stated"
CARD = "README.md"


def exported(folder: str | Path) -> Path:
    """The bundle or model folder that `folder` is, or that a run left in it.

    Raises:
        VizattnError: There is none.
    """
    folder = Path(folder)
    for place in (folder, folder / "bundle", folder / "model"):
        if (place / CONFIG_NAME).is_file() or (place / "model.json").is_file():
            return place
    ended = "The run has not ended: go on with --resume. " if (folder / "checkpoints").is_dir() else ""
    raise VizattnError(
        f"There is nothing to publish in {folder}. {ended}Name a bundle ({CONFIG_NAME} and {WEIGHTS_NAME}), a model "
        "folder (model.json and model.safetensors), or the work directory of a run that has one."
    )


def prepare(source: Path, target: Path, repo: str | None = None) -> str:
    """Write into `target` all that is published of `source`, and return the card.

    Paths of this machine in what was recorded of the training are cut to their last part. A card that somebody wrote,
    `README.md` in `source`, is taken as it is.

    Args:
        source: From `exported`.
        target: Created if it is missing.
        repo: ``owner/name``, for the card.

    Raises:
        VizattnError: The files are damaged, or may not be given on, as their backbone was released without a licence.
    """
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() == source.resolve():
        raise VizattnError(f"{target} is what is to be published: choose another folder to write to.")
    if (source / CONFIG_NAME).is_file():
        subject = _bundle(source, target)
    else:
        subject = _model(source, target)
    own = source / CARD
    name = source.resolve().parent.name if source.name in ("bundle", "model") else source.resolve().name
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    if not text or GENERATED in text:
        text = card(subject, repo or f"OWNER/{name}")
    write_text(target / CARD, text)
    return text


def _bundle(source: Path, target: Path) -> Subject:
    config = read_bundle(source)
    weights = source / WEIGHTS_NAME
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != config["weights_sha256"]:
        raise VizattnError(
            f"{weights} is damaged: its checksum is not the one in {CONFIG_NAME}. Save the bundle again."
        )
    backbone, methods = config["backbone"], [adapter["method"] for adapter in config["adapters"]]
    full_name = backbone["name"] + (f".{backbone['tag']}" if backbone["tag"] else "")
    whole = [method for method in methods if METHODS[method].trains_backbone]
    if whole:
        _refuse_unlicensed(full_name, f"The adapter {whole[0]!r} makes the bundle {source} hold a whole model")
    config["metadata"] = _without_paths(config["metadata"])
    write_text(target / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    _copy(weights, target / WEIGHTS_NAME)
    recipe = config["metadata"].get("config") or {}
    return Subject(
        backbone=full_name,
        hub_id=_hub_id(full_name),
        adapters=config["adapters"],
        class_names=config["class_names"],
        num_classes=config["num_classes"],
        preprocessing=config["preprocessing"],
        metrics={key: values for key, values in config["metadata"].items() if _is_metric(values)},
        recipe=recipe,
        segmenter=config.get("segmenter"),
        licence=_licence(full_name),
        pretrained=recipe.get("model", {}).get("pretrained", True),
        whole=bool(whole),
        megabytes=weights.stat().st_size / 1e6,
    )


def _model(source: Path, target: Path) -> Subject:
    from timm.models import save_for_hf

    from vizattn.engine.evaluate import load_trained

    trained = load_trained(source)
    note = json.loads((source / "model.json").read_text(encoding="utf-8"))
    name = note["model"]["name"]
    _refuse_unlicensed(name, f"{source} is a whole model")
    segmenter = note.get("segmenter")
    if not segmenter:  # in timm's layout, so that its create_model("hf-hub:...") finds everything
        options = {"model_config": {"label_names": trained.class_names}, "data_config": trained.preprocessing}
        save_for_hf(trained.model, str(target), safe_serialization=True, **options)
    weights = source / "model.safetensors"
    _copy(checked_file(weights, note.get("weights_sha256", "")) or weights, target / "model.safetensors")
    note |= {"config": _without_paths(note["config"]), "model": _without_paths(note["model"])}
    write_text(target / "model.json", json.dumps(note, indent=2) + "\n")
    recipe = note["config"] or {}
    return Subject(
        backbone=name,
        hub_id=_hub_id(name),
        adapters=[],
        class_names=trained.class_names,
        num_classes=note["num_classes"],
        preprocessing=trained.preprocessing,
        metrics=_metrics_beside(source),
        recipe=recipe,
        segmenter=segmenter,
        licence=_licence(name),
        pretrained=recipe.get("model", {}).get("pretrained", False),
        whole=True,
        megabytes=(target / "model.safetensors").stat().st_size / 1e6,
    )


def _licence(name: str) -> str | None:
    cfg = get_pretrained_cfg(name.split("/")[-1])
    return (cfg.license if cfg else None) or None


def _hub_id(name: str) -> str | None:
    cfg = get_pretrained_cfg(name)
    return (cfg.hf_hub_id if cfg else None) or None


def _refuse_unlicensed(name: str, what: str) -> None:
    """Raise where weights of `name` were released without a licence: nobody may give them on."""
    if _licence(name) == NO_LICENCE:
        raise VizattnError(
            f"{what} of {name.partition('.')[0]}, whose weights were released without a licence: they may not be "
            "hosted elsewhere, and the files do not show that nothing of them is in it. Publish a bundle instead, "
            "which holds an adapter and a head and names the backbone: train with adapter=dict(method='vpt'), say."
        )


def _is_metric(values: object) -> bool:
    return isinstance(values, dict) and bool(values) and all(isinstance(value, float) for value in values.values())


def _metrics_beside(model: Path) -> dict[str, dict[str, float]]:
    """What the run of a model folder measured, by metric and split, where its `results.json` is still beside it."""
    try:
        results = json.loads((model.parent / "results.json").read_text(encoding="utf-8"))
        by_split = results["metrics"] if Path(results["exported"]).name == model.name else {}
        found: dict[str, dict[str, float]] = {}
        for split, metrics in by_split.items():
            for key in ("accuracy", "miou"):
                if key in metrics:
                    found.setdefault(key, {})[split] = metrics[key]
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or of something else
        return {}


def _without_paths(value: Any) -> Any:
    """The same with absolute paths cut to their last part: they say something of a machine, and nothing elsewhere."""
    if isinstance(value, Mapping):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    if isinstance(value, str):
        scheme, colon, path = value.rpartition("local-dir:")
        path = os.path.expanduser(path)
        return f"{scheme}{colon}{Path(path).name}" if os.path.isabs(path) else value
    return value


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def upload(folder: Path, repo: str) -> str:
    """Send all files of `folder` to the repository, which is made if it does not exist; returns its address.

    The token is that of `hf auth login` or `HF_TOKEN`, the hub that of `HF_ENDPOINT`.

    Raises:
        VizattnError: No token, no connection, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if get_token() is None:
        raise VizattnError("There is no token for the hub: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="vizattn", library_version=__version__)
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=f"vizattn {__version__}")
        return str(address)
    except HFValidationError as error:
        raise VizattnError(f"{repo!r} cannot be a repository, which is OWNER/NAME: {error}") from error
    except OfflineModeIsEnabled as error:
        raise VizattnError("HF_HUB_OFFLINE is set, so nothing can be uploaded.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = {
            401: "it does not know the token: log in again with `hf auth login`",
            403: f"the token may not write to {repo}: it needs the permission to write, there",
        }.get(status, str(error).strip().partition("\n")[0])
        raise VizattnError(f"The hub at {api.endpoint} refused to take {repo}: {reason}.") from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]  # which one the hub's client uses depends on its version
        if library not in ("httpx", "httpx2", "requests") and not isinstance(error, ConnectionError | TimeoutError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise VizattnError(
            f"The hub at {api.endpoint} cannot be reached: {reason}. --dry-run FOLDER writes all files without it."
        ) from error
