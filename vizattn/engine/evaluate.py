"""Measure a model on a split, export it, load it again: `evaluate`, `load_trained`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from torch import nn

from vizattn.engine.build import build_data, check_classes, choose_device, make_loader, set_transforms
from vizattn.engine.checkpoint import checkpoints_in, load_model_state, read_checkpoint
from vizattn.engine.config import apply_overrides, resolve_config
from vizattn.engine.kinds import kind_of
from vizattn.engine.models import OWN_WEIGHTS, model_preprocessing, weights_options
from vizattn.engine.runner import TaskRunner, distributed
from vizattn.errors import VizattnError
from vizattn.files import checked_file, read_json, told_in_words, write_with_note
from vizattn.heads import Segmenter

__all__ = ["Trained", "as_published", "evaluate", "export", "export_whole", "load_trained", "measure"]


@dataclass
class Trained:
    """A trained model with what is needed to use it."""

    model: nn.Module = field(repr=False)
    class_names: list[str]
    preprocessing: dict[str, Any]
    config: dict[str, Any] | None = field(repr=False)
    """The recipe it was trained by, where it is known."""
    palette: list[list[int]] | None = None
    """Colours (red, green, blue) of the classes of a segmenter, each 0 to 255."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe it was trained by, or else one that says the task alone."""
        task = "segmentation" if isinstance(self.model, Segmenter) else "classification"
        return self.config or {"task": task, "model": {"name": "none"}}


def measure(
    model: nn.Module,
    dataset: Any,
    config: Mapping[str, Any],
    device: torch.device,
    class_names: list[str],
    also: Sequence[BaseMetric] = (),
) -> dict[str, Any]:
    """Metrics of `model` on `dataset`, from images, by mmengine's test loop; exact over several processes.

    Those of `also` see the same predictions.
    """
    kind = kind_of(config)
    loader = make_loader(dataset, config, device, train=False)
    with tempfile.TemporaryDirectory() as scratch:  # the Runner wants to log; a bundle may be read-only
        runner = TaskRunner(
            kind.build_task(model, config, len(class_names), "images"),
            Path(scratch),
            device=device,
            log_file=Path(scratch) / "eval.log",
            name="eval",
            test_dataloader=loader,
            test_cfg={},
            test_evaluator=Evaluator([kind.build_metric(class_names), *also]),
            default_hooks={"logger": None, "checkpoint": None, "timer": None, "param_scheduler": None},
            visualizer={"type": "Visualizer", "vis_backends": []},
        )
        try:
            return runner.test()
        finally:
            runner.close()


def export(
    model: nn.Module,
    folder: Path,
    config: Mapping[str, Any],
    class_names: list[str],
    preprocessing: Mapping[str, Any],
    metrics: Mapping[str, Any],
    palette: list[list[int]] | None = None,
) -> None:
    """Write what `load_trained` reads: a bundle with an adapter, else `model.safetensors` and `model.json`."""
    if config["adapter"]:
        import vizattn

        best = kind_of(config).best
        reached = {split: values[best] for split, values in metrics.items()}
        vizattn.save_adapter(
            model,
            folder,
            class_names=class_names,
            preprocessing=dict(preprocessing),
            metadata={best: reached, "config": dict(config), "palette": palette},
        )
        return
    export_whole(model, folder, config["model"], config, class_names, preprocessing, palette)


def export_whole(
    model: nn.Module,
    folder: Path,
    options: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    class_names: list[str],
    preprocessing: Mapping[str, Any],
    palette: list[list[int]] | None,
) -> None:
    """Write `model.safetensors` and `model.json`; `options` are those of `timm.create_model`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    note = {
        "format_version": 1,
        "model": _without_weights(model, options),
        "num_classes": len(class_names),
        "class_names": class_names,
        "preprocessing": dict(preprocessing),
        "config": None if config is None else dict(config),
        "segmenter": getattr(model, "head_config", None),
        "palette": palette,
    }
    weights = folder / "model.safetensors"
    with told_in_words(weights):
        write_with_note(weights, lambda path: save_file(tensors, path), folder / "model.json", note)


def _without_weights(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` for the architecture alone, without a hub, folder or file to read."""
    kept = {key: value for key, value in options.items() if key not in OWN_WEIGHTS}
    if ":" in kept["name"]:
        args = {key: value for key, value in getattr(model, "_model_args", {}).items() if key != "num_classes"}
        kept |= {**args, "name": model.pretrained_cfg["architecture"]}
    return {**kept, "pretrained": False}


def load_trained(folder: str | Path, weights: str | Path | None = None) -> Trained:
    """The model that a run exported, in evaluation mode: from a bundle, a model folder, or a run's work directory.

    Of a run that did not end, the best checkpoint or else the newest; any checkpoint file may be named, too.

    Args:
        folder: What was trained.
        weights: For a bundle, a file with the pretrained weights of its backbone; by default they are fetched.

    Raises:
        VizattnError: None of these, or what is there does not fit together.
    """
    folder = Path(folder)
    for place in (folder, folder / "bundle", folder / "model"):
        if (place / "adapter_config.json").is_file():
            return _load_bundle(place, weights)
    if weights is not None:
        raise VizattnError(f"There is no bundle in {folder}, and only a bundle lacks weights of its backbone.")
    if folder.is_file():
        return _load_checkpoint(folder)
    for place in (folder, folder / "model"):
        if (place / "model.json").is_file():
            return _load_model(place)
    best = folder / "checkpoints" / "best.pth"
    for path in [best] if best.is_file() else checkpoints_in(best.parent)[-1:]:
        return _load_checkpoint(path)
    found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else None
    raise VizattnError(
        f"There is no trained model in {folder}: expected adapter_config.json (a bundle), model.json, or a run's work "
        f"directory with bundle/, model/ or checkpoints/ in it; found {', '.join(found) if found else 'nothing'}."
    )


def _load_bundle(folder: Path, weights: str | Path | None) -> Trained:
    from vizattn.adapters import create_from_bundle, read_bundle

    bundle = read_bundle(folder)
    if not bundle.get("class_names"):
        raise VizattnError(f"The bundle {folder} carries no class names: save it with class_names=...")
    model = create_from_bundle(folder, weights).float()  # as images are; of a model in half precision the same values
    metadata = bundle.get("metadata") or {}
    return Trained(
        model,
        bundle["class_names"],
        bundle["preprocessing"],
        metadata.get("config"),
        _palette(metadata.get("palette"), bundle["class_names"], folder),
    )


def _load_model(folder: Path) -> Trained:
    import timm
    from safetensors.torch import load_file

    import vizattn  # noqa: F401  (registers the backbones)

    try:
        note = read_json(folder / "model.json")
        version = note["format_version"]
        if version > 1:
            raise VizattnError(f"{folder}/model.json has format {version}; this version of vizattn reads up to 1.")
        options = dict(note["model"])
        if note.get("segmenter"):
            backbone = timm.create_model(options.pop("name"), features_only=True, **options)
            model: nn.Module = Segmenter(backbone, **note["segmenter"])
        else:
            model = timm.create_model(options.pop("name"), num_classes=note["num_classes"], **options)
        weights: Path | None = folder / "model.safetensors"
        if "weights_sha256" in note:  # folders of older versions have none
            weights = checked_file(folder / "model.safetensors", note["weights_sha256"])
        if weights is None:
            raise ValueError("the checksum of model.safetensors is not the one in model.json")
        state = load_file(weights)
        config, class_names, preprocessing = note["config"], note["class_names"], note["preprocessing"]
        if not isinstance(class_names, list) or len(class_names) != note["num_classes"]:
            raise VizattnError(f"{folder}/model.json has {note['num_classes']} classes, but class_names {class_names}.")
        if not isinstance(preprocessing, dict) or not isinstance(config, dict | None):
            raise VizattnError(f"{folder}/model.json is damaged: preprocessing and config must be objects.")
    except VizattnError:
        raise
    except Exception as error:  # whatever a damaged file makes of a model
        raise VizattnError(f"Cannot load the model in {folder}: {type(error).__name__}: {error}") from error
    load_model_state(model, state, folder)
    return Trained(model.eval(), class_names, preprocessing, config, _palette(note.get("palette"), class_names, folder))


def _palette(value: Any, class_names: list[str], where: Path) -> list[list[int]] | None:
    """The colours that came with a model, checked.

    Raises:
        VizattnError: They are no colours, or not as many as there are classes.
    """
    if value is None:
        return None
    entries = value if isinstance(value, list | tuple) else []
    colours = [list(colour) if isinstance(colour, list | tuple) else [] for colour in entries]
    if len(colours) != len(class_names) or not all(
        len(colour) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in colour) for colour in colours
    ):
        raise VizattnError(f"{where} is damaged: its palette must be a colour [red, green, blue] for each class.")
    return colours


def _load_checkpoint(path: Path) -> Trained:
    from vizattn.adapters import fingerprint

    state = read_checkpoint(path)
    config = resolve_config(state["config"])
    if not config["adapter"]:
        config["model"]["pretrained"] = False  # the checkpoint has every weight
    model = kind_of(config).build_model(config, len(state["class_names"]))
    load_model_state(model, {**state["model"], **(state.get("ema") or {})}, path)
    if config["adapter"] and state.get("fingerprint") != fingerprint(model):
        raise VizattnError(
            f"{path} was trained on other frozen weights of {config['model']['name']} than are here now."
        )
    return Trained(
        model.eval(),
        state["class_names"],
        state["preprocessing"],
        config,
        _palette(state.get("palette"), state["class_names"], path),
    )


def as_published(
    recipe: Mapping[str, Any],
    weights: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str = "test",
) -> Trained:
    """The recipe's backbone with the weights and the head it is published with, nothing trained here.

    Args:
        recipe: As read from its file.
        weights: The published file, where it is here already.
        overrides: Dotted options on top of the recipe, as in ``{"data.root": "photos"}``.
        split: A split that the data has.

    Raises:
        VizattnError: Its weights cannot be had, or their head has not the task or the classes of the recipe.
    """
    chosen = {**(overrides or {}), "adapter": None, **weights_options(weights)}
    config = resolve_config(apply_overrides(recipe, chosen))
    if config["task"] != "classification":
        raise VizattnError(
            f"Backbones are published with heads for classification; the recipe's task is {config['task']}."
        )
    class_names = build_data(config["data"], [split]).class_names
    model = kind_of(config).build_model(config, len(class_names)).eval()
    published = model.pretrained_cfg["num_classes"]  # type: ignore[index]
    if published != len(class_names):
        raise VizattnError(
            f"{config['model']['name']} is published with a head of {published} classes, "
            f"but data {config['data']['name']!r} has {len(class_names)}."
        )
    return Trained(model, class_names, model_preprocessing(model, config), config)


def evaluate(
    trained: str | Path | Trained,
    *,
    split: str = "test",
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Metrics of a trained model: accuracy, accuracy_top5, loss, accuracy_per_class; or miou, macc, aacc,
    iou_per_class; and samples.

    Args:
        trained: What `load_trained` takes or gives.
        split: "train", "val", "test", or of class folders without split folders "all".
        overrides: Dotted options on top of the recipe it was trained by, as in ``{"data.root": "photos"}``.
        device: By default CUDA when there is one.

    Raises:
        VizattnError: No such model or split, or data with other classes than the head's.
    """
    trained = trained if isinstance(trained, Trained) else load_trained(trained)
    config = resolve_config(apply_overrides(trained.recipe, overrides or {}))
    data = build_data(config["data"], [split])
    set_transforms(data, trained.preprocessing, config)
    check_classes(data.class_names, trained.class_names, "the trained model")
    chosen = choose_device(device)
    with distributed(chosen):
        return measure(trained.model, data.splits[split], config, chosen, trained.class_names)
